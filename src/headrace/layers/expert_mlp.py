"""A mixture of plain feed-forward experts: top-k of a softmax, not renormalized (Nomic's embedder)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headrace.kernels.activation import activate
from headrace.kernels.experts import combine, expert_linear, plan_experts, route
from headrace.layers.linear import Linear, parameter

__all__ = ["ExpertMLP"]


class ExpertMLP(nn.Module):
    """``sum over the top experts of p_e * (act(x @ up_e.T) @ down_e) + bias`` (Nussbaum and Duderstadt 2025).

    Attributes:
        up: [E * I, D], experts one after another.
        down: [E * I, D] as checkpoints have it, [E * D, I] after finish().
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
        self._laid_out = False

    def finish(self) -> None:
        """Called once, when the weights are there: lays the second projection out as products read it."""
        if not self._laid_out:
            stored = self.down.data.view(self.num_experts, -1, self.down.shape[1])
            down = stored.transpose(1, 2).reshape(-1, stored.shape[1])
            self.down = torch.nn.Parameter(down, requires_grad=False)
            self._laid_out = True

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        assert self._laid_out, "finish() was not called"
        weights, chosen = route(self.router(x), self.experts_per_token, renormalize=False)
        plan = plan_experts(chosen, self.num_experts)
        inner = activate(expert_linear(x, self.up, plan), self.activation)
        return combine(expert_linear(inner, self.down, plan), weights) + self.bias
