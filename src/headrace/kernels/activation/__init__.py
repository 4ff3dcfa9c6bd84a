"""Activations, alone and as gates: ``act(gate) * up`` of a fused projection (Shazeer 2020)."""

from __future__ import annotations

from torch import Tensor

from headrace.kernels.dispatch import kernel

__all__ = ["ACTIVATIONS", "activate", "bias_activate", "gelu_mul", "gelu_tanh_mul", "silu_mul"]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")  # relu2: max(x, 0) ** 2 (So et al. 2021)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up [..., 2 I], gate in the first half; returns [..., I]."""
    return kernel("activation", "silu_mul", gate_up.device.type)(gate_up)  # type: ignore[no-any-return]


def gelu_mul(gate_up: Tensor) -> Tensor:
    """The same with the exact (erf) gelu."""
    return kernel("activation", "gelu_mul", gate_up.device.type)(gate_up)  # type: ignore[no-any-return]


def gelu_tanh_mul(gate_up: Tensor) -> Tensor:
    """The same with gelu's tanh approximation."""
    return kernel("activation", "gelu_tanh_mul", gate_up.device.type)(gate_up)  # type: ignore[no-any-return]


def activate(x: Tensor, name: str) -> Tensor:
    """One of ACTIVATIONS, elementwise; ``x`` may be overwritten."""
    return kernel("activation", "activate", x.device.type)(x, name)  # type: ignore[no-any-return]


def bias_activate(x: Tensor, bias: Tensor | None, name: str) -> Tensor:
    """``name(x + bias)``, x [T, D] contiguous, bias [D]; one of ACTIVATIONS or ``tanh``. ``x`` may be overwritten."""
    return kernel("activation", "bias_activate", x.device.type)(x, bias, name)  # type: ignore[no-any-return]
