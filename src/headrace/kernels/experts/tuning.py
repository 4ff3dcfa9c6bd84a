"""Shapes of the kernels over experts' weights: by rules, for GPUs like an H100 or H200."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ProductShape", "block_rows", "max_blocks", "product_shape"]


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
