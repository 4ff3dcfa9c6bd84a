"""What no engine can beat: bytes over bandwidth and operations over arithmetic, at the data sheet's peaks."""

from __future__ import annotations

import msgspec

from headrace.config.accelerators import Accelerator
from headrace.config.plan.shape import ModelShape
from headrace.config.plan.weights import Weights

__all__ = ["Floors", "floors"]


class Floors(msgspec.Struct, frozen=True, kw_only=True):
    """Lower bounds in seconds, upper bounds in tokens a second.

    Attributes:
        prompt: tokens of the prompt that ``first_token`` is for.
        first_token: seconds to the first token of one such prompt.
        token: seconds of a decode step of one sequence.
        single: tokens a second of one sequence.
        batch: sequences in the step that ``throughput`` is for.
        throughput: tokens a second of that many sequences, each ``prompt`` tokens long so far.
    """

    prompt: int
    first_token: float
    token: float
    single: float
    batch: int
    throughput: float


def floors(
    gpu: Accelerator, ranks: int, shape: ModelShape, weights: Weights, *, arithmetic: str, kv_bytes: int, batch: int,
    prompt: int = 1024,
) -> Floors:  # fmt: skip
    """Bounds of a model on ``ranks`` devices.

    Args:
        arithmetic: format of the operands of its products: ``bfloat16``, ``float16``, ``fp8`` or ``fp4``.
        kv_bytes: of one token, on all ranks together.
    """
    flops = gpu.flops.get(arithmetic) or gpu.flops["float16"]
    rate, bandwidth = flops * ranks, gpu.bandwidth * ranks
    table = weights.by_kind.get("embedding", 0)
    products = weights.active - (0 if shape.tied else shape.vocab * shape.hidden if table else 0)
    scores = 4 * shape.layers * shape.heads * shape.head_dim
    triangle = 1 if shape.encoder else 2
    operations = 2 * products * prompt + scores * prompt * prompt / triangle
    first = max(operations / rate, weights.read_step / bandwidth)
    token = (weights.read_step + prompt * kv_bytes) / bandwidth
    step_bytes = _touched(shape, weights, batch) + batch * prompt * kv_bytes
    step = max(step_bytes / bandwidth, (2 * products + scores * prompt) * batch / rate)
    if shape.encoder:
        return Floors(
            prompt=prompt, first_token=first, token=0.0, single=prompt / first, batch=batch,
            throughput=prompt * rate / operations,
        )  # fmt: skip
    return Floors(
        prompt=prompt, first_token=first, token=token, single=1 / token, batch=batch, throughput=batch / step
    )


def _touched(shape: ModelShape, weights: Weights, batch: int) -> int:
    """Bytes of weights that a step of ``batch`` tokens reads: E(1 - (1 - k/E)^B) experts of each layer."""
    if not shape.experts or not shape.chosen:
        return weights.read_step
    share = shape.chosen / shape.experts
    routed = weights.by_kind.get("experts", 0)
    one = routed * share
    return round(weights.read_step - one + routed * (1 - (1 - share) ** batch))
