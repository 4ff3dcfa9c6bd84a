"""Normalization over the last dimension."""

from __future__ import annotations

from torch import Tensor

from headrace.kernels.dispatch import kernel

__all__ = ["add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm (Zhang and Sennrich 2019), computed in float32.

    Args:
        x: [..., D].
        weight: [D], of x's dtype or float32.

    Returns:
        Like x.
    """
    return kernel("norm", "rms_norm", x.device.type)(x, weight, eps)  # type: ignore[no-any-return]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``residual + x`` and its rms_norm, as (normed, sum). ``residual`` may be overwritten with the sum."""
    return kernel("norm", "add_rms_norm", x.device.type)(x, residual, weight, eps)  # type: ignore[no-any-return]


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> Tensor:
    """Layer norm (Ba et al. 2016) over the last dimension of x [..., D], or of ``residual + x``.

    ``x`` may be overwritten where there is a residual.
    """
    return kernel("norm", "layer_norm", x.device.type)(x, weight, bias, eps, residual)  # type: ignore[no-any-return]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """``residual + x`` and its layer_norm, as (normed, sum). ``residual`` may be overwritten with the sum."""
    return kernel("norm", "add_layer_norm", x.device.type)(x, residual, weight, bias, eps)  # type: ignore[no-any-return]
