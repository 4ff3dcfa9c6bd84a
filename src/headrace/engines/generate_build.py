"""From a checkpoint to a loaded core that generates."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from headrace.checkpoints.base import Checkpoint
from headrace.config.plan.facts import Facts
from headrace.config.plan.memory import CPU_STEP_TOKENS, CUDA_STEP_TOKENS
from headrace.config.plan.scratch import Scratch, largest_load, prompt_rows, scratch
from headrace.config.plan.shape import ModelShape, read_shape
from headrace.config.plan.weights import packed_format
from headrace.config.spec import EngineSpec
from headrace.engines.finite import require_finite
from headrace.engines.generate import GenerateCore
from headrace.engines.memory import give_back, kv_block_bytes, num_kv_blocks, take_for_steps, take_for_weights
from headrace.engines.quality import check_quality, tell_harm
from headrace.engines.stages import Stages
from headrace.engines.weights import kv_dtype, load_weights
from headrace.errors import ConfigError, MissingFile, UnsupportedCheckpoint
from headrace.execution.blank_step import is_finite
from headrace.execution.constraints.compiler import ConstraintCompiler
from headrace.execution.gather import gather
from headrace.execution.runner import Runner
from headrace.kvcache.blocks import BlockPool
from headrace.kvcache.pool import allocate_caches
from headrace.layers.linear import FixedLinear, Linear
from headrace.layers.packed import LayerCache
from headrace.messages import Ready
from headrace.models.decoder import DecoderModel
from headrace.models.loading import Progress
from headrace.models.registry import family_of, read_config
from headrace.quantization.containers import QuantizedCheckpoint
from headrace.scheduling.scheduler import Scheduler
from headrace.text.tokenizer import Tokenizer

__all__ = ["build_generate", "eos_token_ids"]

logger = logging.getLogger("headrace.core")


class _Cache(NamedTuple):
    """The paged KV cache: its blocks, the null block included, and bytes of one over all layers."""

    layers: list[LayerCache]
    num_blocks: int
    block_bytes: int


def build_generate(
    spec: EngineSpec,
    checkpoint: Checkpoint,
    facts: Facts,
    device: torch.device,
    dtype: torch.dtype,
    stages: Stages,
    progress: Progress | None,
    on_compiling: Progress | None,
) -> tuple[GenerateCore, Ready]:
    """Load a decoder and make its core.

    Args:
        facts: of the checkpoint's files.
        progress: told the bytes of weights in place and in all.
        on_compiling: told how many kernels are compiled, and of how many.

    Raises ModelError, ConfigError or DoesNotFit with the way out.
    """
    beside = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
    reading = beside.submit(_tokenizer, checkpoint)
    beside.shutdown(wait=False)
    cache_dtype = _refuse_early(spec, checkpoint, dtype)
    shape = read_shape(facts)
    converts = bool(spec.quantization) or isinstance(checkpoint, QuantizedCheckpoint)
    if not converts:
        take_for_weights(device, facts, shape, dtype)
    stages.done("device")
    model = _load(spec, checkpoint, dtype, device, progress)
    if converts and device.type == "cuda":
        gather(model)
    stages.done("weights")
    sizes = _sizes(spec, model, device)
    need = _need(spec, facts, shape, sizes, dtype, device)
    give_back(device)
    cache = _cache(spec, model, cache_dtype, sizes["max_model_len"], need, device)
    stages.done("memory")
    runner = _runner(spec, model, cache.layers, device, sizes["max_model_len"])
    if device.type == "cuda":
        work = kernel_work(spec, checkpoint, dtype, cache_dtype, sizes)
        _take_all(runner, need, work, sizes, stages, on_compiling)
    require_finite(is_finite(runner), model, spec.model, dtype)
    stages.done("check")
    tokenizer = reading.result()
    eos_ids = _within(eos_token_ids(checkpoint, tokenizer), model.config.vocab_size, spec)
    fingerprint = f"{checkpoint.fingerprint}/{dtype}/{spec.quantization}/{cache_dtype}"
    scheduler = _scheduler(spec, model, cache, sizes, eos_ids, fingerprint)
    overlap = device.type == "cuda" if spec.overlap is None else spec.overlap
    core = GenerateCore(
        runner, scheduler, overlap=overlap, compiler=_compiler(tokenizer, model.config.vocab_size, eos_ids)
    )
    return core, _ready(spec, model, cache, scheduler)


def _sizes(spec: EngineSpec, model: DecoderModel, device: torch.device) -> dict[str, int]:
    """The limits of steps, in the words of ``warm_up``."""
    default = CUDA_STEP_TOKENS if device.type == "cuda" else CPU_STEP_TOKENS
    return {
        "step_tokens": spec.max_num_batched_tokens or default,
        "max_num_seqs": spec.max_num_seqs,
        "max_model_len": _max_model_len(spec, model),
    }


def _need(
    spec: EngineSpec,
    facts: Facts,
    shape: ModelShape,
    sizes: dict[str, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Scratch:
    """What steps take of the device beside weights and cache."""
    load = largest_load(
        spec,
        shape,
        tokens=sizes["step_tokens"],
        context=sizes["max_model_len"],
        dtype_bytes=dtype.itemsize,
        cuda=device.type == "cuda",
        packed=packed_format(facts, spec.quantization),
    )
    return scratch(shape, load)


def _cache(
    spec: EngineSpec,
    model: DecoderModel,
    dtype: torch.dtype,
    max_model_len: int,
    need: Scratch,
    device: torch.device,
) -> _Cache:
    layout = [(layer.num_kv_heads, layer.head_dim) for layer in model.kv_layout]
    block_bytes = kv_block_bytes(layout, spec.block_size, dtype)
    blocks = num_kv_blocks(spec, block_bytes, max_model_len, device, need)
    return _Cache(allocate_caches(layout, blocks, spec.block_size, dtype, device), blocks, block_bytes)


def _scheduler(
    spec: EngineSpec,
    model: DecoderModel,
    cache: _Cache,
    sizes: dict[str, int],
    eos_ids: tuple[int, ...],
    fingerprint: str,
) -> Scheduler:
    return Scheduler(
        BlockPool(cache.num_blocks),
        block_size=spec.block_size,
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=sizes["step_tokens"],
        max_model_len=sizes["max_model_len"],
        eos_ids=eos_ids,
        fingerprint=fingerprint,
        prefix_caching=spec.prefix_caching,
        reserve=spec.admission == "reserve",
        prefix_regime=_prefix_regime(model),
    )


def _compiler(
    tokenizer: Tokenizer | None, vocab_size: int, eos_ids: tuple[int, ...]
) -> ConstraintCompiler | None:
    """Grammars are over texts: there are none without a tokenizer."""
    if tokenizer is None:
        return None
    return ConstraintCompiler(tokenizer.backend.to_str, vocab_size=vocab_size, eos_ids=eos_ids)


def _ready(spec: EngineSpec, model: DecoderModel, cache: _Cache, scheduler: Scheduler) -> Ready:
    return Ready(
        engine="dense" if model.config.experts is None else "moe",
        max_model_len=scheduler.max_model_len,
        max_num_seqs=spec.max_num_seqs,
        vocab_size=model.config.vocab_size,
        summary={
            "kv_bytes": cache.num_blocks * cache.block_bytes,
            "kv_tokens": (cache.num_blocks - 1) * spec.block_size,
            "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        },
    )


def _refuse_early(spec: EngineSpec, checkpoint: Checkpoint, dtype: torch.dtype) -> torch.dtype:
    """The cache's type; what a configuration alone shows to be wrong is refused before gigabytes are read."""
    declared = read_config(checkpoint.config)
    cache_dtype = kv_dtype(spec, checkpoint, declared, dtype)
    tell_harm(spec, declared.num_layers, declared.hidden_size, encodes=False)
    fewer = isinstance(checkpoint, QuantizedCheckpoint) or bool(spec.quantization) or cache_dtype.itemsize < 2
    check_quality(spec, checkpoint, dtype, cache_dtype, changed=fewer)
    return cache_dtype


def _load(
    spec: EngineSpec,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None,
) -> DecoderModel:
    """The model with its weights; one without a language-model head is refused."""
    model = load_weights(spec, checkpoint, dtype, device, progress)
    if model.config.headless:
        raise UnsupportedCheckpoint(
            f"{spec.model}: {checkpoint.config.get('architectures')} has no language-model head; "
            "serve it as an embedder, or give a *ForCausalLM checkpoint",
            param="engine",
        )
    return model


def _runner(
    spec: EngineSpec, model: DecoderModel, caches: list[LayerCache], device: torch.device, max_model_len: int
) -> Runner:
    """CUDA graphs where they can run, else the plain way."""
    sizes: dict[str, Any] = {
        "block_size": spec.block_size,
        "max_num_seqs": spec.max_num_seqs,
        "max_model_len": max_model_len,
    }
    by_length = model.config.rope_boundary is not None
    if spec.deterministic:
        if any(hasattr(m, "in_features") and not isinstance(m, Linear) for m in model.modules()):
            raise ConfigError(
                "deterministic is true and this model has quantized layers, whose kernels depend on the batch; "
                "serve it unquantized, or leave deterministic out",
                param="deterministic",
            )
        FixedLinear.fix(model)
        sizes["fixed"] = True
    runner: Runner
    if device.type == "cuda" and not spec.eager and not by_length:
        from headrace.execution.graphs import GraphRunner

        runner = GraphRunner(model, caches, device=device, **sizes)
    else:
        runner = Runner(model, caches, device=device, rope_by_length=by_length, **sizes)
    runner.prompt_rows = prompt_rows(model.config.vocab_size, cuda=device.type == "cuda")
    return runner


def _take_all(
    runner: Runner,
    need: Scratch,
    work: str,
    sizes: dict[str, int],
    stages: Stages,
    on_compiling: Progress | None,
) -> None:
    """Take what serving will ever need of the device, so that it never asks for more."""
    from headrace.execution.graphs import GraphRunner
    from headrace.execution.warm_up import prepare_kernels, warm_up

    def compiling(done: int, total: int) -> None:
        if done == 0:
            stages.done("rehearsal")
        if on_compiling is not None:
            on_compiling(done, total)

    prepare_kernels(runner, work, **sizes, progress=compiling)
    stages.done("kernels")
    give_back(runner.device)  # what rehearsals left, before what is taken for good
    take_for_steps(runner.device, need, runner if isinstance(runner, GraphRunner) else None)
    stages.done("memory")
    warm_up(runner, **sizes)
    stages.done("warm-up")


def kernel_work(spec: EngineSpec, checkpoint: Checkpoint, *rest: Any) -> str:
    """All that decides which kernels a model needs."""
    settings = (spec.quantization, spec.kv_cache_dtype, spec.deterministic, spec.eager, spec.block_size)
    container = checkpoint.label if isinstance(checkpoint, QuantizedCheckpoint) else ""
    return repr((checkpoint.config, container, settings, rest))


def _prefix_regime(model: DecoderModel) -> Callable[[int], str]:
    """What keys depend on besides tokens, by prompt length: nothing, but for length-dependent rope."""
    boundary = model.config.rope_boundary
    if boundary is None:
        return lambda num_prompt: ""
    if model.config.rope.kind == "dynamic":
        return lambda num_prompt: str(max(num_prompt, boundary))
    return lambda num_prompt: "long" if num_prompt > boundary else "short"


def _within(eos_ids: tuple[int, ...], vocab_size: int, spec: EngineSpec) -> tuple[int, ...]:
    """Those that the model can write: there are no logits of others to forbid."""
    outside = [id for id in eos_ids if not 0 <= id < vocab_size]
    if outside:
        logger.warning(
            "%s: end tokens %s are outside the vocabulary of %d and are left out",
            spec.name,
            outside,
            vocab_size,
        )
    return tuple(id for id in eos_ids if id not in outside)


def eos_token_ids(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Tokens that end an answer: those of generation_config.json and config.json, the tokenizer's own, the family's."""
    ids: dict[int, None] = dict.fromkeys(tokenizer.eos_ids if tokenizer is not None else ())
    for source in (checkpoint.generation_config, checkpoint.config):
        found = source.get("eos_token_id")
        listed = found if isinstance(found, list) else [] if found is None else [found]
        if not all(isinstance(id, int) for id in listed):
            raise UnsupportedCheckpoint(
                f"{checkpoint.path}: eos_token_id is {found!r}; expected a token id, or a list of them",
                param="eos_token_id",
            )
        ids.update(dict.fromkeys(listed))
    if tokenizer is not None:
        ends = [tokenizer.token_to_id(token) for token in family_of(checkpoint.config)[0].turn_ends]
        ids.update(dict.fromkeys(id for id in ends if id in tokenizer.special_ids))
    return tuple(ids)


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """The core needs one for end tokens and grammars only; token ids can be served without."""
    try:
        return Tokenizer.from_path(checkpoint.path)
    except MissingFile:
        return None


def _max_model_len(spec: EngineSpec, model: DecoderModel) -> int:
    own = model.config.max_position_embeddings
    if spec.max_model_len is None:
        return own
    if spec.max_model_len > own:
        raise ConfigError(
            f"max_model_len is {spec.max_model_len}; the checkpoint was made for {own} tokens "
            "(config.json, max_position_embeddings), so longer ones would answer nonsense",
            param="max_model_len",
        )
    return spec.max_model_len
