"""Mixtures of experts: which experts a token goes to, products with the chosen ones' weights, and their sum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headrace.kernels.dispatch import kernel
from headrace.kernels.experts.plan import ExpertPlan

__all__ = [
    "EXPERT_GATES",
    "ExpertPlan",
    "by_expert",
    "combine",
    "expert_linear",
    "gated",
    "plan_experts",
    "route",
]

EXPERT_GATES = ("silu", "gelu", "gelu_tanh", "clamped_swiglu")
"""``act(gate) * up``; ``clamped_swiglu``: gpt-oss's ``g sigmoid(1.702 g) (u + 1)``, g at most 7 and u within +-7."""


def route(logits: Tensor, experts_per_token: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights.

    Args:
        logits: [T, E] of the router, any float type.
        renormalize: weights are a softmax over the chosen experts alone; else over all (Shazeer et al. 2017).

    Returns:
        float32 [T, k] weights, the largest first, and int32 [T, k] experts; of equal logits the first expert. Logits
        that are NaN come last and make all weights of their token NaN, never those of others.
    """
    run = kernel("experts", "route", logits.device.type)
    return run(logits, experts_per_token, renormalize=renormalize)  # type: ignore[no-any-return]


def plan_experts(chosen: Tensor, num_experts: int) -> ExpertPlan:
    """Which rows each expert gets.

    Args:
        chosen: int32 [T, k], as ``route`` returns them.
    """
    return kernel("experts", "plan_experts", chosen.device.type)(chosen, num_experts)  # type: ignore[no-any-return]


def expert_linear(
    x: Tensor, weight: Tensor, plan: ExpertPlan, *, bias: Tensor | None = None, gate: str | None = None
) -> Tensor:
    """Of each pair p of a token and a chosen expert e, ``act(x[row] @ weight[e].T + bias[e])`` with float32 sums.

    Args:
        x: [T, K], one row a token, or [T * k, K], one row a pair; rows contiguous.
        weight: [E * N, K], experts one after another.
        bias: [E * N].
        gate: one of EXPERT_GATES: the first N / 2 outputs go through it and multiply the others.

    Returns:
        [T * k, N] (N / 2 with a gate) like x, pairs of one token side by side. A row depends on no other row.
    """
    run = kernel("experts", "expert_linear", x.device.type)
    return run(x, weight, plan, bias=bias, gate=gate)  # type: ignore[no-any-return]


def by_expert(
    x: Tensor, plan: ExpertPlan, product: Callable[[int, Tensor], Tensor], *, gate: str | None = None
) -> Tensor:
    """``expert_linear`` with any product of one expert and its rows [M, K] -> [M, N]: the reference, and CPUs."""
    from headrace.kernels.experts import reference

    return reference.by_expert(x, plan, product, gate=gate)


def gated(both: Tensor, gate: str) -> Tensor:
    """One of EXPERT_GATES of [M, 2 N], gates in the first half; computed in float32, [M, N] like ``both``."""
    from headrace.kernels.experts import reference

    return reference.gated(both, gate)


def combine(parts: Tensor, weights: Tensor, residual: Tensor | None = None) -> Tensor:
    """``sum over a token's pairs of weight * part + residual``, in float32 and in order, rounded once.

    Args:
        parts: [T * k, D].
        weights: float32 [T, k].
        residual: [T, D].
    """
    run: Callable[..., torch.Tensor] = kernel("experts", "combine", parts.device.type)
    return run(parts, weights, residual)
