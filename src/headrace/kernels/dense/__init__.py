"""A linear map with its activation, over weights laid out once for the device."""

from __future__ import annotations

from torch import Tensor

from headrace.kernels.dispatch import kernel

__all__ = ["dense", "pack", "product"]


def pack(weight: Tensor) -> Tensor:
    """weight [out, in] in the layout that `dense` likes best on this device; may be the same tensor."""
    return kernel("dense", "pack", weight.device.type)(weight)  # type: ignore[no-any-return]


def dense(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    """``activation(x @ weight.T + bias)``.

    A row of the result does not depend on the other rows of x (up to rounding, and on CPUs not even by that).

    Args:
        x: [T, in], contiguous.
        weight: what `pack` returned for [out, in].
        bias: [out] or None.
        activation: ``gelu``, ``gelu_tanh``, ``relu``, ``silu``, ``tanh`` or None.
    Returns:
        [T, out].
    """
    return kernel("dense", "dense", x.device.type)(x, weight, bias, activation)  # type: ignore[no-any-return]


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` over weights as they are, [..., in] -> [..., out]: fast for one row, too."""
    return kernel("dense", "product", x.device.type)(x, weight, bias)  # type: ignore[no-any-return]
