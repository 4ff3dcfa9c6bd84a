"""The least time that a device needs for a generation case: bytes at its copy rate, products at its best rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from headrace.engines.bench.cases import Case
from headrace.layers.packed import LayerCache
from headrace.models.decoder import DecoderModel

__all__ = ["CEILINGS", "Work", "ceilings", "device_name"]

# Bytes/s (read plus written) and bf16 FLOP/s seen on the device: a device-to-device copy and an 8192-cubed product.
CEILINGS = {"NVIDIA H200": (4.28e12, 788e12), "NVIDIA H100 80GB HBM3": (3.0e12, 798e12)}


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def ceilings() -> tuple[float, float] | None:
    """(bytes/s, bf16 FLOP/s) of this device, or None for one that was not measured."""
    return CEILINGS.get(device_name())


@dataclass(frozen=True, slots=True)
class Work:
    """What a model makes a device do.

    Attributes:
        weight_bytes: read by every step: all linear maps and the head, but for experts.
        body, head: multiplications a token in the layers, and a sampled token in the head.
        key_bytes: of one token in the cache of all layers.
        pair_flops: of one query and key in all layers.
        expert_bytes: of all experts' weights.
        expert_share: of the experts that one token meets.
    """

    weight_bytes: int
    body: int
    head: int
    key_bytes: int
    pair_flops: int
    expert_bytes: int = 0
    expert_share: float = 1.0

    @staticmethod
    def of(model: DecoderModel, caches: Sequence[LayerCache]) -> Work:
        """Of a model over caches of whatever type."""
        config = model.config
        head = config.vocab_size * config.hidden_size
        assert model.head is not None
        tokens = [cache.k[0, 0] for cache in caches]
        linears = _linears(model.layers)
        plain = [m for m in linears if not hasattr(m, "num_experts")]
        routed = [m for m in linears if hasattr(m, "num_experts")]
        share = config.experts.experts_per_token / config.experts.num_experts if config.experts else 1.0
        return Work(
            weight_bytes=_bytes(plain) + _bytes(_linears(model.head)),
            body=_numbers(plain) + round(_numbers(routed) * share),
            expert_bytes=_bytes(routed),
            expert_share=share,
            head=head,
            key_bytes=2 * sum(token.numel() * token.element_size() for token in tokens),
            pair_flops=4 * config.num_heads * config.head_dim * config.num_layers,
        )

    def decode_seconds(self, lengths: Sequence[int], rates: tuple[float, float]) -> float:
        """A step of one new token for sequences of these lengths."""
        bandwidth, flops = rates
        read = self.weights_read(len(lengths)) + self.key_bytes * sum(lengths)
        return max(read / bandwidth, 2 * (self.body + self.head) * len(lengths) / flops)

    def weights_read(self, tokens: int) -> float:
        """Bytes in a step of so many tokens, whose experts are as any others'."""
        return self.weight_bytes + self.expert_bytes * (1 - (1 - self.expert_share) ** tokens)

    def prefill_seconds(self, prompts: int, tokens: int, rates: tuple[float, float]) -> float:
        """``prompts`` whole prompts of ``tokens`` each."""
        bandwidth, flops = rates
        products = 2 * self.body * prompts * tokens + 2 * self.head * prompts
        attention = self.pair_flops * prompts * tokens * tokens / 2
        return max((products + attention) / flops, self.weights_read(prompts * tokens) / bandwidth)

    def case_seconds(self, case: Case, rates: tuple[float, float]) -> float:
        """All prompts, then every step of all sequences."""
        total = self.prefill_seconds(case.requests, case.inputs, rates)
        for step in range(1, case.outputs):
            total += self.decode_seconds([case.inputs + step] * case.requests, rates)
        return total


def _linears(module: nn.Module) -> list[Any]:
    """Linear maps of any format, a fused one once."""
    if hasattr(module, "in_features"):
        return [module]
    return [linear for child in module.children() for linear in _linears(child)]


def _numbers(linears: Sequence[Any]) -> int:
    """Multiplications of a row in all of them."""
    return sum(m.in_features * m.out_features for m in linears)


def _bytes(linears: Sequence[Any]) -> int:
    """Bytes of the weights, as they are stored."""
    return sum(
        m.nbytes if hasattr(m, "nbytes") else m.weight.numel() * m.weight.element_size() for m in linears
    )
