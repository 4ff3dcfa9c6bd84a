"""Linear maps on GPUs: cuBLAS, and the activation with its bias in one pass over the product."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from headrace.kernels.activation.triton import bias_activate

__all__ = ["dense"]


def dense(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    if activation is None:
        return F.linear(x, weight, bias)
    return bias_activate(F.linear(x, weight), bias, activation)
