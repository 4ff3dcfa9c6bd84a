"""Linear maps on GPUs: cuBLAS, and an activation or a gate in the product itself or in one pass over it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from headrace.kernels.activation.triton import GATES, bias_activate
from headrace.kernels.dense import triton_product

__all__ = ["dense", "gated"]


def dense(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    if activation is None:
        return F.linear(x, weight, bias)
    if triton_product.takes(x, weight):
        return triton_product.fused_product(x, weight, bias, activation)
    return bias_activate(F.linear(x, weight), bias, activation)


def gated(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    if triton_product.takes(x, weight):
        return triton_product.fused_product(x, weight, bias, activation, gated=True)
    return GATES[activation](F.linear(x, weight, bias))
