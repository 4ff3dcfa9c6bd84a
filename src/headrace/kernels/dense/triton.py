"""Linear maps on GPUs: cuBLAS, and an activation or a gate in the product itself or in one pass over it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from headrace.kernels.activation.triton import bias_activate
from headrace.kernels.dense import triton_product
from headrace.kernels.linear import MAX_ROWS
from headrace.kernels.linear.triton import small_linear

__all__ = ["dense"]


def dense(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    if x.shape[0] <= MAX_ROWS and x.itemsize == 2 and x.shape[1] % 16 == 0:
        out = small_linear(x, weight, bias=bias if activation is None else None)
        return out if activation is None else bias_activate(out, bias, activation)
    if activation is None:
        return F.linear(x, weight, bias)
    if triton_product.takes(x, weight):
        return triton_product.fused_product(x, weight, bias, activation)
    return bias_activate(F.linear(x, weight), bias, activation)
