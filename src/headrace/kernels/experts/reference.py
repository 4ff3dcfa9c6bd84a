"""Mixtures of experts straight from the definition: one product an expert that has rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headrace.kernels.activation.reference import activate
from headrace.kernels.dense import product
from headrace.kernels.experts.plan import ExpertPlan

__all__ = [
    "SWIGLU_ALPHA",
    "SWIGLU_LIMIT",
    "by_expert",
    "combine",
    "expert_linear",
    "gated",
    "plan_experts",
    "route",
]

SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0  # gpt-oss


def route(logits: Tensor, experts_per_token: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
    wide = logits.float()
    order = torch.where(wide.isnan(), -torch.inf, wide).sort(dim=-1, descending=True, stable=True)
    chosen = order.indices[:, :experts_per_token]
    best = wide.gather(1, chosen)
    top = wide.amax(-1, keepdim=True)
    among = best if renormalize else wide
    weights = (best - top).exp() / (among - top).exp().sum(-1, keepdim=True)
    weights = torch.where(wide.isnan().any(-1, keepdim=True), torch.nan, weights)
    return weights, chosen.to(torch.int32)


def plan_experts(chosen: Tensor, num_experts: int) -> ExpertPlan:
    return ExpertPlan(chosen, num_experts)


def expert_linear(
    x: Tensor, weight: Tensor, plan: ExpertPlan, *, bias: Tensor | None = None, gate: str | None = None
) -> Tensor:
    weights = weight.unflatten(0, (plan.num_experts, -1))
    biases = None if bias is None else bias.unflatten(0, (plan.num_experts, -1))
    return by_expert(
        x, plan, lambda e, rows: product(rows, weights[e], None if biases is None else biases[e]), gate=gate
    )


def by_expert(
    x: Tensor, plan: ExpertPlan, product: Callable[[int, Tensor], Tensor], *, gate: str | None = None
) -> Tensor:
    shared = plan.num_pairs // x.shape[0]  # pairs that share a row of x
    by_pair = plan.chosen.flatten()
    order = by_pair.sort(stable=True).indices
    counts = by_pair.bincount(minlength=plan.num_experts).tolist()
    out = None
    at = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        pairs = order[at : at + count]
        at += count
        part = product(expert, x[pairs // shared])
        if gate is not None:
            part = gated(part, gate)
        if out is None:
            out = part.new_empty(plan.num_pairs, part.shape[1])
        out[pairs] = part
    assert out is not None, "no tokens"
    return out


def gated(both: Tensor, gate: str) -> Tensor:
    first, second = both.float().chunk(2, dim=-1)
    if gate == "clamped_swiglu":
        first = first.clamp(max=SWIGLU_LIMIT)
        second = second.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT) + 1
        return (first * torch.sigmoid(SWIGLU_ALPHA * first) * second).to(both.dtype)
    return (activate(first, gate) * second).to(both.dtype)


def combine(parts: Tensor, weights: Tensor, residual: Tensor | None = None) -> Tensor:
    by_token = parts.view(*weights.shape, -1)
    out = by_token[:, 0].float() * weights[:, :1]
    for i in range(1, weights.shape[1]):
        out = torch.addcmul(out, by_token[:, i].float(), weights[:, i : i + 1])
    if residual is not None:
        out = out + residual.float()
    return out.to(parts.dtype)
