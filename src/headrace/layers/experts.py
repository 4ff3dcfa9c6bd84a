"""A mixture of gated feed-forward experts, of which each token meets a few."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headrace.kernels.experts import ExpertPlan, combine, expert_linear, plan_experts, route
from headrace.layers.linear import Linear
from headrace.layers.mlp import GatedMLP

__all__ = ["ExpertLinear", "Experts", "MixtureOfExperts"]


class ExpertLinear(Linear):
    """A linear map an expert over the same inputs: ``weight`` [E * out, in], experts one after another.

    A quantization scheme replaces the whole module by one of the same signature (quantization/experts.py).

    Args:
        parts: rows of each projection of one expert, in order.
    """

    def __init__(
        self,
        in_features: int,
        *parts: int,
        num_experts: int,
        bias: bool = False,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        every = parts * num_experts
        super().__init__(in_features, sum(every), bias=bias, parts=every, dtype=dtype, device=device)
        self.num_experts = num_experts

    def forward(self, x: Tensor, plan: ExpertPlan, gate: str | None = None) -> Tensor:  # type: ignore[override]
        """[T or T * k, in] -> [T * k, out of one expert], see kernels.experts.expert_linear."""
        return expert_linear(x, self.weight, plan, bias=self.bias, gate=gate)


class Experts(nn.Module):
    """The routed experts' own weights.

    Args:
        gate_up: ExpertLinear of gate and up, or what replaces it.
        down: ExpertLinear back to the stream.
    """

    def __init__(self, gate_up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down


class MixtureOfExperts(nn.Module):
    """``sum over the chosen experts of p_e * down_e(act(gate_e(x)) * up_e(x)) + sigmoid(g(x)) * shared(x)``.

    Experts are chosen by the router's logits (Shazeer et al. 2017); shared experts (Qwen 2, DeepSeek) see all tokens.

    Args:
        router: [.., D] -> [.., E].
        activation: one of kernels.experts.EXPERT_GATES.
        renormalize: see kernels.experts.route.
        shared: of all tokens, or None.
        shared_gate: [.., D] -> [.., 1], or None where ``shared`` counts fully.
    """

    def __init__(
        self,
        router: Linear,
        experts: Experts,
        *,
        num_experts: int,
        experts_per_token: int,
        activation: str,
        renormalize: bool,
        shared: GatedMLP | None = None,
        shared_gate: Linear | None = None,
    ) -> None:
        super().__init__()
        self.router, self.experts = router, experts
        self.num_experts, self.experts_per_token = num_experts, experts_per_token
        self.activation, self.renormalize = activation, renormalize
        self.shared, self.shared_gate = shared, shared_gate

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[T, D] -> [T, D], plus ``residual`` [T, D]."""
        weights, chosen = route(self.router(x), self.experts_per_token, renormalize=self.renormalize)
        plan = plan_experts(chosen, self.num_experts)
        parts = self.experts.down(self.experts.gate_up(x, plan, self.activation), plan)
        shared = self._shared(x)
        if shared is not None and residual is not None:
            shared += residual
        return combine(parts, weights, residual if shared is None else shared)

    def _shared(self, x: Tensor) -> Tensor | None:
        if self.shared is None:
            return None
        out: Tensor = self.shared(x)
        if self.shared_gate is not None:
            out = out * torch.sigmoid(self.shared_gate(x).float()).to(out.dtype)
        return out
