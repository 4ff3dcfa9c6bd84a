"""Activations and gates in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["activate", "bias_activate", "gelu_mul", "gelu_tanh_mul", "silu_mul"]


def activate(x: Tensor, name: str) -> Tensor:
    x32 = x.float()
    if name == "silu":
        return (x32 * torch.sigmoid(x32)).to(x.dtype)
    if name == "relu":
        return F.relu(x)
    if name == "relu2":
        return F.relu(x).square()
    return F.gelu(x32, approximate="tanh" if name == "gelu_tanh" else "none").to(x.dtype)


def _gate(gate_up: Tensor, name: str) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (activate(gate, name) * up).to(gate_up.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    return _gate(gate_up, "silu")


def gelu_mul(gate_up: Tensor) -> Tensor:
    return _gate(gate_up, "gelu")


def gelu_tanh_mul(gate_up: Tensor) -> Tensor:
    return _gate(gate_up, "gelu_tanh")


def bias_activate(x: Tensor, bias: Tensor | None, name: str) -> Tensor:
    x32 = x.float() if bias is None else x.float() + bias.float()
    return (torch.tanh(x32) if name == "tanh" else activate(x32, name)).to(x.dtype)
