"""Shapes of the kernels over experts' weights: by rules, for GPUs like an H100 or H200.

For 4-bit codes ``tuned/<gpu>.json`` comes before the rule: ``codes_key`` -> the fields of an ExpertCodesShape.
benchmarks/tune_experts.py measures and writes it.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import torch

from headrace.kernels.tuned import tuned

__all__ = [
    "FEW",
    "MANY",
    "WIDE",
    "ExpertCodesShape",
    "ProductShape",
    "block_rows",
    "codes_key",
    "codes_rows",
    "codes_shape",
    "eight_bit_shape",
    "max_blocks",
    "product_shape",
]

# All as measured on an H200, on layers of Qwen3-30B-A3B.
_FOLDER = Path(__file__).parent
FEW, MANY, WIDE = 0, 1, 2
_FEW_BLOCKS = 16  # as one token has
_MANY_CODES = {32: (8, 4, MANY, 3), 64: (8, 8, MANY, 3), 128: (8, 4, MANY, 2)}


class ProductShape(NamedTuple):
    """``bn`` outputs a program (of each half, with a gate), ``bk`` columns a step."""

    bn: int
    bk: int
    warps: int
    stages: int


def block_rows(num_pairs: int, num_experts: int) -> int:
    """Rows of a block: about as many as an expert gets on average."""
    each = num_pairs / num_experts
    return 16 if each <= 16 else 32 if each <= 32 else 64 if each <= 96 else 128


def max_blocks(num_pairs: int, num_experts: int, rows: int) -> int:
    """No choice of experts takes more blocks."""
    used = min(num_pairs, num_experts)
    return (num_pairs + used * (rows - 1)) // rows


@functools.cache
def _roomy(device: torch.device) -> bool:
    """Whether a program may have as much shared memory as on an H100; elsewhere shapes are small, and not measured."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


def product_shape(device: torch.device, rows: int, blocks: int, gated: bool, itemsize: int) -> ProductShape:
    """For ``blocks`` blocks of ``rows`` rows and weights of ``itemsize`` bytes a number."""
    if itemsize == 4:
        return ProductShape(64, 32, 4, 2)
    if not _roomy(device):
        return ProductShape(64, 64, 4, 2)
    if rows >= 128 and not gated:
        return ProductShape(256, 64, 8, 3)
    if rows >= 32:
        return ProductShape(128, 64, 8, 4)
    if gated or blocks <= _FEW_BLOCKS:
        return ProductShape(64, 128, 4, 3 if gated else 4)
    return ProductShape(128, 64, 4, 4)


def eight_bit_shape(device: torch.device, rows: int, blocks: int, gated: bool, fp8: bool) -> ProductShape:
    """The same for weights of 8 bits; ``fp8``: activations, too."""
    if not _roomy(device):
        return ProductShape(64, 128, 4, 1)
    if fp8 and rows >= 128:
        return ProductShape(128, 128, 8, 4)
    if fp8 and rows <= 16 and not gated and blocks > _FEW_BLOCKS:
        return ProductShape(128, 128, 4, 3)
    if rows <= 32:
        return ProductShape(64, 128, 4, 4 if fp8 else 3)
    return ProductShape(64 if gated else 128, 128, 4 if rows == 64 else 8, 3)


class ExpertCodesShape(NamedTuple):
    """``bm`` rows and ``tiles`` of 16 outputs a program (both halves of a gate counted).

    ``kind``: FEW: K is spread over the warps, which decode for themselves; MANY: decoded weights pass through shared
    memory; WIDE: weights are decoded while the ones before are multiplied (gluon_codes.py; with a gate, ``tiles`` is
    twice ``warps``).
    """

    bm: int
    tiles: int
    warps: int
    kind: int = FEW
    stages: int = 1


def codes_rows(num_pairs: int, num_experts: int, block: int) -> int:
    """How full blocks are, as tuned tables count it: 1: few pairs; 4: up to four rows an expert; else ``block``."""
    if num_pairs <= _FEW_BLOCKS:
        return 1
    return 4 if block == 16 and num_pairs <= 4 * num_experts else block


def codes_key(rows: int, n: int, k: int, group: int, gated: bool) -> str:
    """In the tuned table, of weights [n, k] an expert (both halves of a gate) whose ``group`` columns share a scale.

    Args:
        rows: as ``codes_rows``.
    """
    return f"{rows}:{n}x{k}/{group}{'g' if gated else ''}"


def codes_shape(
    device: torch.device, rows: int, block: int, most: int, n: int, k: int, group: int, *, gated: bool, itemsize: int,
    wide: bool = False,
) -> ExpertCodesShape:  # fmt: skip
    """For x of ``itemsize`` bytes a number and 4-bit weights, see ``codes_key``.

    Args:
        block: rows of the plan's blocks, of which ``most`` at most hold something.
        wide: shapes of that kind can be taken.
    """
    if itemsize == 4 or not _roomy(device):
        return ExpertCodesShape(8 if most <= 8 else 16 if most <= 16 else 32, 2, 2)
    found = tuned(_FOLDER, device).get(codes_key(rows, n, k, group, gated))
    if found is not None and (wide or found[3] != WIDE):
        return ExpertCodesShape(*found)
    if rows == 1:
        return ExpertCodesShape(8, 2 if gated else 1, 4 if k >= 1024 else 2 if k > 128 else 1)
    if block == 16:
        return ExpertCodesShape(8 if rows == 4 or most <= 8 else 16, 2, 1)
    return ExpertCodesShape(block, 8, 4, WIDE, 4) if wide else ExpertCodesShape(block, *_MANY_CODES[block])
