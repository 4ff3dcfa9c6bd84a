"""Tile shapes of the few-row kernels over weights of few bits: data for measured GPUs and shapes, a rule for others.

``tuned/<gpu>.json`` maps ``"<form>:<rows>:<N>x<K>[g]"`` to a list of numbers in the order of the shape's fields.
Forms: fp8, fp4, int4, ring (FP8 in gluon_ring.py, chosen by the time of a step), and wide (FP4 in gluon_wide.py; an
empty list where it is not the fastest way). Rows: 1, or 8, 16, 32 or 64 for up
to that many; g: gated, N counting both halves. benchmarks/quantized.py --tune measures and writes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from headrace.kernels.launch import supports_gluon
from headrace.kernels.linear.tuning import GemvShape, RingShape
from headrace.kernels.tuned import tuned

__all__ = [
    "CodesShape",
    "PackedShape",
    "WideShape",
    "codes_shape",
    "covers_wide",
    "fp8_ring_shape",
    "gemv_shape",
    "packed_shape",
    "padded_rows",
    "wide_shape",
]

_FOLDER = Path(__file__).parent
FEW_ROWS = 16  # up to which each warp decodes for itself
WIDE_ROWS = 2048  # with more, weights that are dequantized once and torch's product are faster


class PackedShape(NamedTuple):
    """``bn`` outputs a program, ``bk`` columns a step, K split over ``splits`` programs."""

    bn: int
    bk: int
    splits: int
    warps: int
    stages: int


class CodesShape(NamedTuple):
    """For 4-bit codes: ``tiles`` of 16 outputs a program (both halves of a gate counted), K over ``splits`` programs
    and ``warps`` of each."""

    tiles: int
    warps: int
    splits: int


class WideShape(NamedTuple):
    """For hundreds of rows and 4-bit codes: ``tiles`` of 16 outputs and ``bm`` rows a program, K over ``splits``."""

    tiles: int
    bm: int
    splits: int
    warps: int
    stages: int


def padded_rows(rows: int) -> int:
    """Rows of a tile that holds ``rows`` (at most 64)."""
    return 8 if rows <= 8 else 16 if rows <= 16 else 32 if rows <= 32 else 64


def gemv_shape(device: torch.device, n: int, k: int, gated: bool) -> GemvShape:
    """For one row and FP8 weights [n, k]."""
    found = tuned(_FOLDER, device).get(_key("fp8", 1, n, k, gated))
    if found is not None:
        return GemvShape(*found)
    bk = 1024 if k >= 1024 else 1 << max(k - 1, 15).bit_length()
    return GemvShape(4, bk, 4, 1)


def fp8_ring_shape(device: torch.device, rows: int, n: int, k: int, gated: bool) -> RingShape | None:
    """For x [rows, k] and FP8 weights [n, k] where rings are the fastest way (gluon_ring.py); else None."""
    bm = 1 if rows == 1 else max(16, padded_rows(rows))
    found = tuned(_FOLDER, device).get(_key("ring", bm, n, k, gated))
    return RingShape(*found) if found is not None and supports_gluon(device) else None


def packed_shape(device: torch.device, rows: int, n: int, k: int, fp8: bool, gated: bool) -> PackedShape:
    """For x [rows, k] and FP8 or INT8 weights [n, k]: some more programs than an H100 or H200 has multiprocessors."""
    bm = max(16, padded_rows(rows))
    found = tuned(_FOLDER, device).get(_key("fp8", bm, n, k, gated)) if fp8 else None
    if found is not None:
        return PackedShape(*found)
    bk = 256 if fp8 and bm == 16 and not gated else 128
    splits = _splits(-(-n // (128 if gated else 64)), k, bk, 4)
    return PackedShape(64, bk, splits, 4, 4 if fp8 else 3)


def codes_shape(device: torch.device, rows: int, n: int, k: int, fp4: bool, gated: bool) -> CodesShape:
    """For x [rows, k] and 4-bit weights [n, k]."""
    bm = padded_rows(rows)
    found = tuned(_FOLDER, device).get(_key("fp4" if fp4 else "int4", bm, n, k, gated))
    if found is not None:
        return CodesShape(*found)
    if bm <= 16:
        return CodesShape(2, 4, 1) if gated else CodesShape(1, 8, 1)
    return CodesShape(2, 8, 1)


def covers_wide(x: Tensor, group: int, small: bool) -> bool:
    """Whether gluon_wide.py multiplies such rows [M, K] and FP4 weights."""
    decodes = group == 16 or small
    return x.dtype is torch.bfloat16 and x.shape[1] % 64 == 0 and decodes and supports_gluon(x.device)


def wide_shape(device: torch.device, rows: int, n: int, k: int) -> WideShape | None:
    """For x [rows, k] and FP4 weights [n, k]; None where weights that are dequantized first are faster."""
    if rows > WIDE_ROWS:
        return None
    found = tuned(_FOLDER, device).get(f"wide:{max(32, 1 << (rows - 1).bit_length())}:{n}x{k}")
    if found is not None:
        return WideShape(*found) if found else None
    across = -(-n // 128)
    if rows <= 64:
        return WideShape(8, 32 if rows <= 32 else 64, _splits(across, k, 128, 4), 8, 4)
    if across * -(-rows // 256) >= 96:
        return WideShape(8, 256, 1, 8, 4)
    heights = -(-rows // 128)
    if across * heights >= 150:
        return WideShape(8, 128, 1, 8, 4)
    return WideShape(4, 128, _splits(-(-n // 64) * heights, k, 128, 8), 4, 4)


def _splits(tiles: int, k: int, bk: int, steps: int, programs: int = 150) -> int:
    """Parts of K: enough for ``programs``, each with some steps of its own."""
    splits = 1
    while tiles * splits < programs and splits < 8 and k // (splits * 2 * bk) >= steps:
        splits *= 2
    return splits


def _key(form: str, rows: int, n: int, k: int, gated: bool) -> str:
    return f"{form}:{rows}:{n}x{k}{'g' if gated else ''}"
