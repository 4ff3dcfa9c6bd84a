"""From an EngineSpec to a loaded core, in the process that will run it."""

from __future__ import annotations

import time
from typing import Any

import torch

from headrace.checkpoints.base import Checkpoint
from headrace.config.plan.facts import Facts
from headrace.config.spec import EngineSpec
from headrace.config.support import require_supported
from headrace.engines.choices import choose_device, choose_dtype, choose_encode_dtype
from headrace.engines.encode import EncodeCore
from headrace.engines.encode_build import build_encode, check_int8_pays
from headrace.engines.generate import GenerateCore
from headrace.engines.generate_build import build_generate
from headrace.engines.inspect import inspect
from headrace.engines.loop import Core
from headrace.engines.memory import give_back, steady_heap
from headrace.engines.quality import check_quality, tell_harm
from headrace.engines.select import select
from headrace.engines.stages import Stages
from headrace.engines.weights import open_weights
from headrace.errors import ConfigError
from headrace.execution.encode_runner import EncodeRunner
from headrace.execution.threads import ThreadGovernor
from headrace.layers.dense import Dense
from headrace.layers.eight_bits import EightBitLinear
from headrace.messages import Ready
from headrace.models.decoder import DecoderModel
from headrace.models.loading import Progress
from headrace.quantization.containers import QuantizedCheckpoint
from headrace.quantization.linear import PackedLinear
from headrace.quantization.scaled import ScaledLinear

__all__ = ["build"]


def build(
    spec: EngineSpec,
    progress: Progress | None = None,
    stages: Stages | None = None,
    on_compiling: Progress | None = None,
) -> tuple[Core, Ready]:
    """Load the model of ``spec`` and make the core that serves it.

    Args:
        progress: told the bytes of weights in place and in all.
        stages: what the start took until now; its parts end up in the summary.
        on_compiling: told how many kernels are compiled, and of how many.

    Raises ModelError, ConfigError or DoesNotFit with the way out.
    """
    began = time.perf_counter()
    stages = stages or Stages()
    require_supported(spec)
    checkpoint = open_weights(spec)
    device = choose_device(spec)
    facts = inspect(checkpoint.path)
    encodes = select(facts, spec).engine in ("bert", "embed")
    if spec.deterministic and (encodes or device.type == "cpu"):
        where = "a model of one pass" if encodes else "a CPU"
        raise ConfigError(
            f"deterministic is true and this is {where}, where the order of sums depends on the batch; "
            "leave deterministic out, or generate on a GPU",
            param="deterministic",
        )
    threads = spec.num_threads or torch.get_num_threads()
    if device.type == "cpu":
        if not encodes:  # whose passes are so short that taking pages anew would be a tenth of them
            steady_heap()
        torch.set_num_threads(1)  # reading files gains little from more, and loses much where others compute
    core: EncodeCore[EncodeRunner] | GenerateCore
    try:
        if encodes:
            core, ready = _build_encode(spec, checkpoint, device, stages, on_compiling)
        else:
            core, ready = _build_generate(spec, checkpoint, facts, device, progress, stages, on_compiling)
    finally:
        torch.set_num_threads(threads)
    if device.type == "cpu":
        give_back(device)
    if device.type == "cpu" and spec.num_threads is None:
        core.runner.threads = ThreadGovernor(threads)
    ready.summary["seconds"] = round(time.perf_counter() - began, 2)
    stages.done("rest")
    ready.summary["start"] = stages.seconds
    return core, ready


def _build_encode(
    spec: EngineSpec,
    checkpoint: Checkpoint,
    device: torch.device,
    stages: Stages,
    on_compiling: Progress | None,
) -> tuple[EncodeCore[EncodeRunner], Ready]:
    check_int8_pays(spec, device)
    dtype = choose_encode_dtype(spec, checkpoint, device)
    fewer = isinstance(checkpoint, QuantizedCheckpoint) or bool(spec.quantization)
    tell_harm(spec, 0, 0, encodes=True)
    check_quality(spec, checkpoint, dtype, dtype, changed=fewer)
    core, ready = build_encode(spec, checkpoint, device, dtype, stages, on_compiling)
    ready.summary.update(_summary(checkpoint, core.runner.model, device, dtype))
    return core, ready


def _build_generate(
    spec: EngineSpec,
    checkpoint: Checkpoint,
    facts: Facts,
    device: torch.device,
    progress: Progress | None,
    stages: Stages,
    on_compiling: Progress | None,
) -> tuple[GenerateCore, Ready]:
    dtype = choose_dtype(spec, checkpoint, device, packs=True)
    core, ready = build_generate(spec, checkpoint, facts, device, dtype, stages, progress, on_compiling)
    model = core.runner.model
    assert isinstance(model, DecoderModel)
    ready.summary.update(_summary(checkpoint, model, device, dtype))
    return core, ready


def _summary(
    checkpoint: Checkpoint, model: torch.nn.Module, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Facts for people and logs."""
    tensors = [*model.parameters(), *model.buffers()]
    packed = [
        module
        for module in model.modules()
        if isinstance(module, (PackedLinear, ScaledLinear, EightBitLinear))
    ]
    prepacked = [module for module in model.modules() if isinstance(module, Dense) and module.packed_bytes]
    outside = sum(module.in_features * module.out_features for module in (*packed, *prepacked))
    outside_bytes = sum(m.nbytes for m in packed) + sum(m.packed_bytes for m in prepacked)
    return {
        "architecture": (checkpoint.config.get("architectures") or ["?"])[0],
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()) + outside,
        "weight_bytes": sum(t.numel() * t.element_size() for t in tensors) + outside_bytes,
        "packed_linears": len(packed),
    }
