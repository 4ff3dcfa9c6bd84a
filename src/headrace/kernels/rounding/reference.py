"""Norms, activations and gates as the others have them, then rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.activation import reference as activation_reference
from headrace.kernels.norm import reference as norms
from headrace.kernels.rounding import BLOCK, Bound, Format, Rounded, hadamard, top, within

__all__ = ["activate", "gate", "linear", "norm", "rotated", "rows"]


def rotated(x: Tensor) -> Tensor:
    """float32 [T, D], each BLOCK columns rotated."""
    assert x.shape[1] % BLOCK == 0, "widths are multiples of 32"
    return (x.float().reshape(-1, BLOCK) @ hadamard(x.device)).view(x.shape)


def rows(x: Tensor, format: Format) -> Rounded:
    values = x.float() if format == "fp8" else rotated(x)
    largest = top(format)
    scale = values.abs().amax(1, keepdim=True).clamp(min=1e-10) / largest
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    codes = (values / scale).clamp(-largest, largest)
    if format == "int8":
        return Rounded(codes.nan_to_num().round().to(torch.int8), scale)
    return Rounded(codes.to(torch.float8_e4m3fn), scale)


def norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    format: Format,
    *,
    layer: bool,
    full: bool = False,
    keep: bool = False,
) -> Rounded:
    if residual is not None and keep:
        x = residual.copy_(residual + x)
        residual = None
    if layer:
        y = norms.layer_norm(x, weight, bias, eps, residual)
    else:
        y = norms.rms_norm(x if residual is None else residual + x, weight, eps)
    found = rows(y, format)
    return Rounded(found.codes, found.scale, y if full else None)


def activate(x: Tensor, bias: Tensor | None, name: str, format: Format) -> Rounded:
    return rows(activation_reference.bias_activate(x, bias, name), format)


def gate(gate_up: Tensor, bias: Tensor | None, name: str, format: Format) -> Rounded:
    first, up = (gate_up.float() if bias is None else gate_up.float() + bias.float()).chunk(2, -1)
    return rows((activation_reference.activate(first.contiguous(), name) * up).to(gate_up.dtype), format)


def linear(
    x: Rounded,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    activation: str | None = None,
    rounds: Format | None = None,
    bound: Bound | None = None,
) -> Tensor | Rounded:
    out = (x.codes.float() @ weight.float().T) * x.scale * scale
    if bias is not None:
        out = out + bias.float()
    if activation is not None:
        out = activation_reference.bias_activate(out, None, activation)
    if rounds is None:
        return out.to(dtype)
    return rows(out.to(dtype), rounds) if bound is None else within(out, bound)
