"""A linear map with what stands around it, in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["argmax_linear", "fixed_linear", "small_linear"]


def small_linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm: tuple[Tensor, float] | None = None,
    bias: Tensor | None = None,
    gate: str | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    y = _product(x, weight, norm)
    if bias is not None:
        y = y + bias.float()
    if gate is not None:
        half = y.shape[1] // 2
        left = y[:, :half]
        if gate == "silu":
            left = left * torch.sigmoid(left)
        else:
            left = F.gelu(left, approximate="tanh" if gate == "gelu_tanh" else "none")
        y = left * y[:, half:]
    if residual is not None:
        y = y + residual.float()
    return y.to(out_dtype or x.dtype)


def argmax_linear(x: Tensor, weight: Tensor, *, norm: tuple[Tensor, float] | None = None) -> Tensor:
    values, tokens = _product(x, weight, norm).max(-1)
    return torch.where(torch.isfinite(values), tokens, -1)


def fixed_linear(x: Tensor, weight: Tensor, *, bias: Tensor | None = None) -> Tensor:
    # One row at a time: a product of many may be summed in another order.
    rows = [small_linear(row[None], weight, bias=bias) for row in x]
    return torch.cat(rows) if rows else x.new_empty(0, weight.shape[0])


def _product(x: Tensor, weight: Tensor, norm: tuple[Tensor, float] | None) -> Tensor:
    x32 = x.float()
    if norm is not None:
        gain, eps = norm
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * gain.float()
    return x32 @ weight.float().T
