"""The linear map as PyTorch has it, then the activation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["activated", "dense", "pack", "product"]


def pack(weight: Tensor) -> Tensor:
    return weight


def dense(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    return activated(F.linear(x, weight, bias), activation)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def activated(x: Tensor, name: str | None) -> Tensor:
    if name is None:
        return x
    if name == "tanh":
        return torch.tanh(x)
    if name == "relu":
        return F.relu(x)
    if name == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")
