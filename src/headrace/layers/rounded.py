"""Rows rounded to FP8 by the norm or the gate that makes them, for linears that take them so."""

from __future__ import annotations

from torch import Tensor, nn

from headrace.kernels import rounding
from headrace.kernels.rounding import Rounded
from headrace.layers.norm import LayerNorm, NoNorm, RMSNorm

__all__ = ["add_normed", "normed", "takes_rounded"]


def takes_rounded(reader: nn.Module, x: Tensor) -> bool:
    """Whether ``reader`` takes rows like x [T, *] rounded (quantization/scaled.py), and rounds them otherwise."""
    takes = getattr(reader, "takes_rounded", None)
    return takes is not None and bool(takes(x))


def normed(norm: nn.Module, x: Tensor, readers: tuple[nn.Module, ...]) -> Tensor | Rounded:
    """The norm of x, for ``readers``."""
    if isinstance(norm, RMSNorm) and all(takes_rounded(reader, x) for reader in readers):
        return rounding.norm(x, None, norm.weight, None, norm.eps, "fp8", layer=False)
    return norm(x)  # type: ignore[no-any-return]


def add_normed(
    norm: RMSNorm | LayerNorm | NoNorm, x: Tensor, residual: Tensor, readers: tuple[nn.Module, ...]
) -> tuple[Tensor | Rounded, Tensor]:
    """(norm(residual + x), residual + x), the former for ``readers``; ``residual`` may be overwritten with the sum."""
    if isinstance(norm, RMSNorm) and all(takes_rounded(reader, x) for reader in readers):
        found = rounding.norm(x, residual, norm.weight, None, norm.eps, "fp8", layer=False, keep=True)
        return found, residual
    return norm.add(x, residual)
