"""A ScaledExperts' product on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from headrace.kernels.experts import ExpertPlan, gated
from headrace.kernels.experts import triton_eight_bits as eight
from headrace.kernels.experts.triton_codes import expert_codes
from headrace.kernels.quantized_linear.tiling import ROWS
from headrace.quantization.device import GROUP, eight_bits, rounded_rows, tiles
from headrace.quantization.schemes.fp8 import Fp8Weight
from headrace.quantization.schemes.group_int import GroupIntWeight
from headrace.quantization.tiled import TiledWeight

if TYPE_CHECKING:
    from headrace.quantization.experts import ScaledExperts

__all__ = ["product"]


def product(experts: ScaledExperts, x: Tensor, plan: ExpertPlan, gate: str | None) -> Tensor:
    """See ScaledExperts.forward."""
    weight = experts.held
    if isinstance(weight, TiledWeight):
        n = weight.shape[0] // plan.num_experts
        if gate is not None and n // 2 % ROWS:  # halves do not end with a tile
            both = expert_codes(x, plan=plan, rows=weight.shape[0], bias=experts.bias, **tiles(weight))
            return gated(both, gate)
        return expert_codes(x, plan=plan, rows=weight.shape[0], bias=experts.bias, gate=gate, **tiles(weight))
    common: dict[str, Any] = {"bias": experts.bias, "gate": gate, "out_dtype": x.dtype}
    if isinstance(weight, GroupIntWeight):
        return eight.expert_eight_bits(x, eight_bits(experts), plan, **common)
    assert isinstance(weight, Fp8Weight)
    if experts.activations.kind == "none":
        wide = eight_bits(experts)._replace(form=eight.WIDE_FP8)
        return eight.expert_eight_bits(x, wide, plan, **common)
    codes, scale = rounded_rows(experts, x)
    x_group = GROUP if experts.activations.kind == "group" else 0
    return eight.expert_eight_bits(codes, eight_bits(experts), plan, x_scale=scale, x_group=x_group, **common)
