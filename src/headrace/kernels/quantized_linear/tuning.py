"""Tile shapes of the few-row kernels over weights of few bits: data for measured GPUs and shapes, a rule for others.

``tuned/<gpu>.json`` maps ``"<form>:<rows>:<N>x<K>[g]"`` (form: fp8, fp4 or int4; rows: 16, 32 or 64, at most that
many; g: gated, N counting both halves) to a list of numbers in the order of the shape's fields.
benchmarks/quantized.py --tune measures and writes them.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch

from headrace.kernels.linear.tuning import GemvShape

__all__ = ["CodesShape", "codes_shape", "gemv_shape"]


class CodesShape(NamedTuple):
    """``bn`` outputs a program, K split over ``splits`` programs."""

    bn: int
    splits: int
    warps: int
    stages: int


def gemv_shape(device: torch.device, n: int, k: int, gated: bool) -> GemvShape:
    """For one row and FP8 weights [n, k], n counting both halves."""
    found = _tuned(device).get(f"fp8:1:{n}x{k}{'g' if gated else ''}")
    if found is not None:
        return GemvShape(*found)
    bk = 2048 if k % 2048 == 0 else 1024 if k >= 1024 else 1 << max(k - 1, 15).bit_length()
    return GemvShape(2 if gated else 4, bk, 4, 1)


def codes_shape(device: torch.device, rows: int, n: int, k: int, fp4: bool, gated: bool) -> CodesShape:
    """For x [rows, k] and n outputs; 4-bit weights."""
    bm = 16 if rows <= 16 else 32 if rows <= 32 else 64
    total = n * (2 if gated else 1)
    found = _tuned(device).get(f"{'fp4' if fp4 else 'int4'}:{bm}:{total}x{k}{'g' if gated else ''}")
    if found is not None:
        return CodesShape(*found)
    bn = 128 if fp4 and bm == 16 and not gated else 64
    tiles = -(-n // bn)
    splits = 1
    while tiles * splits < 150 and splits < 8 and k // (splits * 2 * 256) >= 2:
        splits *= 2
    return CodesShape(bn, splits, 4, 4 if bm == 16 else 3)


@functools.cache
def _tuned(device: torch.device) -> dict[str, list[int]]:
    """The measurements for this GPU, or none."""
    if device.type != "cuda":
        return {}
    name = torch.cuda.get_device_name(device).lower().replace(" ", "-")
    path = Path(__file__).parent / "tuned" / f"{name}.json"
    if not path.exists():
        return {}
    table: dict[str, list[int]] = json.loads(path.read_text())
    return table
