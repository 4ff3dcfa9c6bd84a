"""A mixture of plain feed-forward experts: top-k of a softmax, not renormalized (Nomic's embedder)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headrace.kernels.activation import activate
from headrace.layers.linear import Linear, parameter

__all__ = ["ExpertMLP"]


class ExpertMLP(nn.Module):
    """``sum over the top experts of p_e * (act(x @ up_e.T) @ down_e) + bias`` (Nussbaum and Duderstadt 2025).

    Attributes:
        up, down: [E * I, D], experts one after another, as the checkpoint has them.
        bias: [D], one for all experts.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        num_experts: int,
        experts_per_token: int,
        activation: str,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.num_experts, self.experts_per_token, self.activation = num_experts, experts_per_token, activation
        self.router = Linear(hidden_size, num_experts, bias=False, dtype=dtype, device=device)
        self.up = parameter(num_experts * intermediate_size, hidden_size, dtype=dtype, device=device)
        self.down = parameter(num_experts * intermediate_size, hidden_size, dtype=dtype, device=device)
        self.bias = parameter(hidden_size, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        weights, chosen = self.router(x).float().softmax(-1).topk(self.experts_per_token)
        out = self.bias.expand_as(x).clone()
        ups, downs = self.up.chunk(self.num_experts), self.down.chunk(self.num_experts)
        for expert in range(self.num_experts):
            rows, slots = (chosen == expert).nonzero(as_tuple=True)
            if rows.numel() == 0:
                continue
            inner = activate(x[rows] @ ups[expert].T, self.activation)
            part = (inner @ downs[expert]) * weights[rows, slots].to(x.dtype)[:, None]
            out.index_add_(0, rows, part)
        return out
