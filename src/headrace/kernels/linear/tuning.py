"""Tile shapes of the small-row kernels: data for measured (GPU, shape) pairs, a rule for all others.

``tuned/<gpu>.json`` maps ``"<rows>:<N>x<K>[g]"`` (rows: 1, 16, 32 or 64; g: gated) to a list of numbers in the
order of GemvShape's or SkinnyShape's fields. benchmarks/kernels.py --tune measures and writes them.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import torch

from headrace.kernels.tuned import tuned

__all__ = [
    "GemvShape",
    "RingShape",
    "Shape",
    "SkinnyShape",
    "StreamShape",
    "gemv_shape",
    "ring_rule",
    "ring_shape",
    "skinny_shape",
    "stream_shape",
]

_FOLDER = Path(__file__).parent


class GemvShape(NamedTuple):
    """One row: ``bn`` outputs a program, ``bk`` columns a load."""

    bn: int
    bk: int
    warps: int
    stages: int


class SkinnyShape(NamedTuple):
    """Up to ``bm`` rows: ``bn`` outputs a program, ``bk`` columns a load, K split over ``splits`` programs."""

    bm: int
    bn: int
    bk: int
    splits: int
    warps: int
    stages: int


class StreamShape(NamedTuple):
    """Tiles of ``bm`` rows and ``bn`` outputs, ``bk`` columns a load, K split over ``splits`` programs.

    Attributes:
        x_first: rows are the first operand of the product, and weights, perhaps few of them, the second.
        ahead: loads of weights asked for before the wait for the kernel before.
    """

    bm: int
    bn: int
    bk: int
    splits: int
    warps: int
    stages: int
    x_first: bool = False
    ahead: int = 4


class RingShape(NamedTuple):
    """Up to ``bm`` rows: ``bn`` outputs a program, ``bk`` columns of K folded ``fold`` times a load.

    Attributes:
        x_first: rows are the first operand of the product: 64 of them or more when folded.
    """

    bm: int
    bn: int
    bk: int
    fold: int
    splits: int
    stages: int
    x_first: bool = False


Shape = GemvShape | SkinnyShape


def gemv_shape(device: torch.device, n: int, k: int, gated: bool) -> GemvShape:
    """For x [1, k] and weight [n, k]."""
    found = tuned(_FOLDER, device).get(_key(1, n, k, gated))
    if found is not None:
        return GemvShape(*found)
    bk = 1024 if k >= 1024 else 1 << max(k - 1, 15).bit_length()
    return GemvShape(2 if gated else 4, bk, 4, 1)


def skinny_shape(device: torch.device, rows: int, n: int, k: int, gated: bool) -> SkinnyShape:
    """For x [rows, k], rows from 2 to 64, and weight [n, k]."""
    bm = 16 if rows <= 16 else 32 if rows <= 32 else 64
    found = tuned(_FOLDER, device).get(_key(bm, n, k, gated))
    if found is not None:
        return SkinnyShape(*found)
    bk = 64 if gated or k < 128 else 128
    tiles = -(-n // (128 if gated else 64))
    # Enough programs for two on each of some 132 multiprocessors, each with two or more steps of its own.
    splits = 1
    while tiles * splits < 180 and splits < 8 and k // (splits * 2 * bk) >= 2:
        splits *= 2
    return SkinnyShape(bm, 64, bk, splits, 4, 3 if bm == 64 and not gated else 4)


def stream_shape(device: torch.device, rows: int, n: int, k: int, gated: bool) -> StreamShape:
    """For x [rows, k], any number of rows, and weight [n, k]."""
    bm = next((size for size in (16, 32, 64, 128) if rows <= size), 256)
    found = tuned(_FOLDER, device).get("s" + _key(bm, n, k, gated))
    if found is not None:
        return StreamShape(*found)
    bm = min(bm, 128)
    bn = 64 if bm <= 64 or gated else 128
    tiles = -(-n // (bn * (2 if gated else 1))) * -(-rows // bm)
    splits = 1
    while tiles * splits < 100 and splits < 8 and k // (splits * 2 * 64) >= 4:
        splits *= 2
    return StreamShape(bm, bn, 64 if k < 1024 or bm > 64 else 128, splits, 4 if bm <= 64 else 8, 4)


def ring_shape(device: torch.device, rows: int, n: int, k: int, gated: bool) -> RingShape | None:
    """For x [rows, k] and weight [n, k], where rings are the fastest way (gluon_ring.py); else None."""
    bm = next((size for size in (1, 8, 16, 32, 64) if rows <= size), 0)
    table, key = tuned(_FOLDER, device), _key(bm, n, k, gated)
    if "r" + key in table:
        return RingShape(*table["r" + key])
    ruled = 1 < bm <= 16 and k >= 1024 and "s" + key not in table and _is_hopper(device)
    return ring_rule(bm, n, k, gated) if ruled else None


def ring_rule(bm: int, n: int, k: int, gated: bool) -> RingShape:
    """Close to the best of eight measured shapes on an H200, for up to 16 rows."""
    halves = 2 if gated else 1
    fold = next((fold for fold in (1, 2) if n // halves * fold >= 64 * 384 and k % (8 * fold) == 0), 4)
    fold, bn = (fold, 64 // fold) if k % (8 * fold) == 0 else (1, 64)
    bk = 128 if fold == 1 else 64
    stage = 2 * bk * fold * (halves * bn + bm)
    return RingShape(bm, bn, bk, fold, 1, max(1, min(-(-k // (fold * bk)), (76 << 10) // stage)))


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _key(rows: int, n: int, k: int, gated: bool) -> str:
    return f"{rows}:{n}x{k}{'g' if gated else ''}"
