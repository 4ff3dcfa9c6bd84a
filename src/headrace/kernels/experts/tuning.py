"""Shapes of the kernels over experts' weights: by rules, for GPUs like an H100 or H200."""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "ExpertCodesShape",
    "ProductShape",
    "block_rows",
    "codes_shape",
    "eight_bit_shape",
    "max_blocks",
    "product_shape",
]


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


def product_shape(rows: int, gated: bool, itemsize: int) -> ProductShape:
    """For blocks of ``rows`` rows and weights of ``itemsize`` bytes a number."""
    if itemsize == 4:
        return ProductShape(64, 32, 4, 2)
    if rows <= 32:
        return ProductShape(64, 128 // itemsize * 2, 4, 3 if gated else 4)
    if rows == 64:
        return ProductShape(64 if gated else 128, 64, 4, 4 if gated else 3)
    return ProductShape(64 if gated else 128, 64, 8, 4)


def eight_bit_shape(rows: int, gated: bool, fp8: bool) -> ProductShape:
    """For blocks of ``rows`` rows and weights of 8 bits; ``fp8``: activations, too."""
    if rows <= 32:
        return ProductShape(64, 128, 4, 4 if fp8 else 3)
    if rows == 64:
        return ProductShape(64 if gated else 128, 128, 4, 3)
    return ProductShape(64 if gated else 128, 128, 8, 3)


class ExpertCodesShape(NamedTuple):
    """``bm`` rows and ``tiles`` of 16 outputs a program (both halves of a gate counted).

    ``many``: decoded weights pass through shared memory; else K is spread over the warps, which decode for themselves.
    """

    bm: int
    tiles: int
    warps: int
    many: bool = False
    stages: int = 1


def codes_shape(rows: int, blocks: int, gated: bool) -> ExpertCodesShape:
    """For blocks of ``rows`` rows and 4-bit weights of ``blocks`` times 128 columns."""
    if rows >= 64:
        return ExpertCodesShape(rows, 8, 8 if rows > 64 else 4, True, 3)
    warps = (
        8 if blocks % 8 == 0 and not gated else 4 if blocks % 4 == 0 or blocks > 8 else 2 if blocks > 1 else 1
    )
    bm = 8 if rows <= 8 else 16 if rows <= 16 else 32
    return ExpertCodesShape(bm, 2 if gated or bm == 32 else 1, warps)
