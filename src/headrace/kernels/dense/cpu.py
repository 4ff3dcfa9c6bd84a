"""oneDNN over weights packed once, so that no row of the result depends on its neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.kernels.dense import reference

__all__ = ["dense", "pack", "product"]

# Our word -> oneDNN's (name, algorithm).
_FUSED = {
    None: ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "tanh": ("tanh", ""),
    "silu": ("swish", ""),
}
_TYPES = (torch.float32, torch.bfloat16)


def pack(weight: Tensor) -> Tensor:
    if not torch.backends.mkldnn.is_available() or weight.dtype not in _TYPES:
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)  # type: ignore[no-any-return]


def dense(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    if weight.layout is not torch._mkldnn:  # type: ignore[attr-defined]
        return reference.dense(x, weight, bias, activation)
    name, algorithm = _FUSED[activation]
    linear = torch.ops.mkldnn._linear_pointwise
    return linear(x, weight, bias, name, [], algorithm)  # type: ignore[no-any-return]


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype is not torch.bfloat16 or x.numel() != x.shape[-1] or not torch.backends.mkldnn.enabled:
        return F.linear(x, weight, bias)
    # oneDNN reads bfloat16 weights at a third of the memory's speed when there is one row; PyTorch's own
    # product (float32 sums, one rounding) reads at all of it.
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        return F.linear(x, weight, bias)
    finally:
        torch.backends.mkldnn.enabled = True  # type: ignore[assignment]
