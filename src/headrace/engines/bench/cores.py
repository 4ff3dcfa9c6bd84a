"""Cores with random weights, sized for the cases that they will run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from headrace.config.quantization import quantization_type
from headrace.config.shapes import SHAPES
from headrace.engines.bench.cases import Case
from headrace.engines.generate import GenerateCore
from headrace.errors import ConfigError, nearest
from headrace.execution.graphs import GraphRunner
from headrace.execution.runner import Runner
from headrace.kvcache.blocks import BlockPool
from headrace.kvcache.pool import allocate_caches
from headrace.layers.linear import Linear
from headrace.models.decoder import DecoderModel
from headrace.models.loading import random_weights
from headrace.models.registry import read_config
from headrace.quantization.registry import load_time
from headrace.scheduling.scheduler import Scheduler

__all__ = ["build_core", "quantize", "random_model", "read_shape"]

BLOCK = 16


def read_shape(name: str) -> dict[str, Any]:
    """config.json of a known shape, a folder or a file. Raises ConfigError."""
    if name in SHAPES:
        return dict(SHAPES[name])
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--random is {name!r}{nearest(name, SHAPES)}; expected one of {', '.join(SHAPES)}, or a config.json "
            f"({error})",
            param="random",
        ) from error
    return found


def random_model(
    config: dict[str, Any],
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str = "",
    only: str = "",
) -> DecoderModel:
    """A decoder of random weights, quantized as loading does. Raises as read_config, and ConfigError.

    Args:
        only: part of the paths of linears that are quantized.
    """
    model = random_weights(read_config(config), dtype=dtype, device=device)
    if model.head is None:
        raise ConfigError(
            f"{config.get('architectures')} has no language-model head; only generation is measured here",
            param="random",
        )
    if quantization:
        quantize(model, quantization, only)
    return model


def quantize(model: DecoderModel, scheme: str, only: str = "") -> None:
    """Swap the linears as loading does; of those, the ones with ``only`` in their path."""
    transform = load_time(quantization_type(scheme), model.embed.weight.device)
    for path, module in list(model.named_modules()):
        if isinstance(module, Linear) and only in path:
            model.set_submodule(path, transform(path, module))


def build_core(
    model: DecoderModel,
    cases: Iterable[tuple[int, int, int]],
    *,
    eager: bool,
    step_tokens: int,
    cache: torch.dtype | None = None,
    fixed: bool = False,
) -> GenerateCore:
    """A core whose cache holds each of the cases at once.

    Args:
        eager: no CUDA graphs; on a CPU there are none.
        cache: type of keys and values, the model's if None.
        fixed: deterministic mode.
    """
    device = model.embed.weight.device
    sizes = [Case(*case) for case in cases]
    blocks = 2 + max(case.requests * (-(-(case.inputs + case.outputs) // BLOCK) + 1) for case in sizes)
    blocks += blocks // 50
    layout = [(layer.num_kv_heads, layer.head_dim) for layer in model.kv_layout]
    caches = allocate_caches(layout, blocks, BLOCK, cache or model.embed.weight.dtype, device)
    rows = max(case.requests for case in sizes)
    length = max(8192, max(case.inputs + case.outputs for case in sizes))
    options: dict[str, Any] = {
        "device": device,
        "block_size": BLOCK,
        "max_num_seqs": rows,
        "max_model_len": length,
        "fixed": fixed,
    }
    runner = (
        Runner(model, caches, **options)
        if eager or device.type == "cpu"
        else GraphRunner(model, caches, **options)
    )
    scheduler = Scheduler(
        BlockPool(blocks), block_size=BLOCK, max_num_seqs=rows, max_num_batched_tokens=step_tokens,
        max_model_len=length, prefix_caching=False,
    )  # fmt: skip
    return GenerateCore(runner, scheduler, overlap=device.type == "cuda")
