"""Experts' weights in few bits: the signature of layers.experts.ExpertLinear over what the schemes hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from headrace.kernels.experts import ExpertPlan, by_expert
from headrace.kernels.quantized_linear.eight_bits import reads_groups
from headrace.kernels.quantized_linear.tiling import ROWS
from headrace.quantization.linear import JoinedLinear, PackedLinear
from headrace.quantization.scaled import Activations, QuantizedWeight, ScaledLinear
from headrace.quantization.schemes.fp8 import Fp8Weight
from headrace.quantization.schemes.group_int import GroupIntWeight
from headrace.quantization.tiled import can_tile, tile

__all__ = ["PackedExperts", "ScaledExperts", "multiplies_experts"]

_STEP = 128  # columns that the kernels multiply at once under scales of groups


def multiplies_experts(weight: QuantizedWeight, num_experts: int) -> bool:
    """Whether a GPU's kernels take such weights of experts."""
    if isinstance(weight, Fp8Weight):
        wide = weight.block[1]
        return wide >= weight.shape[1] or wide % _STEP == 0 or (wide in (16, 32, 64))
    if isinstance(weight, GroupIntWeight) and weight.bits == 8:
        return weight.order is None and reads_groups(weight.group, weight.shape[1])
    return can_tile(weight) and weight.shape[0] // num_experts % ROWS == 0


class ScaledExperts(ScaledLinear):
    """A ScaledLinear an expert: weight [E * out, in], experts one after another.

    Args:
        weight: of all experts; on a GPU one that ``multiplies_experts`` takes.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        *,
        num_experts: int,
        bias: Tensor | None = None,
        parts: tuple[int, ...] | None = None,
        activations: Activations | None = None,
    ) -> None:
        self.num_experts = num_experts
        if activations is None or activations.kind == "nvfp4":  # no product of experts takes that
            activations = Activations()
        super().__init__(weight, bias=bias, parts=parts, activations=activations)

    def hold(self, weight: QuantizedWeight) -> None:
        """Keep the weights as a GPU's products read them."""
        self.held = weight
        assert multiplies_experts(weight, self.num_experts), type(weight)
        if not isinstance(weight, Fp8Weight) and can_tile(weight):
            self.held = tile(weight)

    def forward(self, x: Tensor, plan: ExpertPlan, gate: str | None = None) -> Tensor:  # type: ignore[override]
        """[T or T * k, in] -> [T * k, out of one expert], see kernels.experts.expert_linear."""
        if self._on_gpu:
            from headrace.quantization.expert_device import product

            return product(self, x, plan, gate)
        return by_expert(x, plan, self._one, gate=gate)

    def _one(self, expert: int, rows: Tensor) -> Tensor:
        """One expert's product, from dequantized weights."""
        count = self.out_features // self.num_experts
        span = slice(expert * count, (expert + 1) * count)
        weight = self.quantized.rows(span.start, span.stop).dequantize()
        bias = None if self.bias is None else self.bias[span].float()
        return F.linear(self.activations.rounded(rows), weight, bias).to(rows.dtype)


class PackedExperts(JoinedLinear):
    """A PackedLinear an expert, for CPUs."""

    def __init__(self, linears: Sequence[PackedLinear]) -> None:
        super().__init__(linears)
        self.num_experts = len(linears)

    def forward(self, x: Tensor, plan: ExpertPlan, gate: str | None = None) -> Tensor:  # type: ignore[override]
        """[T or T * k, in] -> [T * k, out of one expert], see kernels.experts.expert_linear."""
        return by_expert(x, plan, lambda expert, rows: self.linears[expert](rows), gate=gate)
