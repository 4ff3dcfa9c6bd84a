"""From an EngineSpec to a loaded core, in the process that will run it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from headrace.checkpoints.base import Checkpoint
from headrace.config.plan.facts import Facts
from headrace.config.plan.memory import CPU_STEP_TOKENS, CUDA_STEP_TOKENS
from headrace.config.plan.scratch import Scratch, largest_load, prompt_rows, scratch
from headrace.config.plan.shape import read_shape
from headrace.config.quantization import known_harm
from headrace.config.spec import EngineSpec
from headrace.config.support import require_supported
from headrace.engines.encode import EncodeCore
from headrace.engines.encode_build import build_encode, check_int8_pays
from headrace.engines.finite import require_finite
from headrace.engines.generate import GenerateCore
from headrace.engines.inspect import inspect
from headrace.engines.loop import Core
from headrace.engines.memory import (
    give_back,
    kv_block_bytes,
    num_kv_blocks,
    steady_heap,
    take_for_steps,
    take_for_weights,
)
from headrace.engines.quality import check_quality
from headrace.engines.select import select
from headrace.engines.stages import Stages
from headrace.engines.weights import kv_dtype, load_weights, open_weights
from headrace.errors import ConfigError, MissingFile, UnsupportedCheckpoint
from headrace.execution.blank_step import is_finite
from headrace.execution.constraints.compiler import ConstraintCompiler
from headrace.execution.encode_runner import EncodeRunner
from headrace.execution.gather import gather
from headrace.execution.runner import Runner
from headrace.execution.threads import ThreadGovernor
from headrace.kvcache.blocks import BlockPool
from headrace.kvcache.pool import allocate_caches
from headrace.layers.dense import Dense
from headrace.layers.eight_bits import EightBitLinear
from headrace.layers.linear import FixedLinear, Linear
from headrace.layers.packed import LayerCache
from headrace.messages import Ready
from headrace.models.decoder import DecoderModel
from headrace.models.encode_backbone import is_causal_family
from headrace.models.loading import Progress
from headrace.models.registry import read_config
from headrace.quantization.containers import QuantizedCheckpoint
from headrace.quantization.linear import PackedLinear
from headrace.quantization.registry import keeps_packed
from headrace.quantization.scaled import ScaledLinear
from headrace.scheduling.scheduler import Scheduler
from headrace.text.tokenizer import Tokenizer

__all__ = ["build", "choose_device", "choose_dtype", "choose_encode_dtype", "eos_token_ids"]

logger = logging.getLogger("headrace.core")


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
    _tell_harm(spec, 0, 0, encodes=True)
    check_quality(spec, checkpoint, dtype, dtype, changed=fewer)
    core, ready = build_encode(spec, checkpoint, device, dtype, stages, on_compiling)
    ready.summary.update(_summary(checkpoint, core.runner.model, device, dtype))
    return core, ready


def _tell_harm(spec: EngineSpec, layers: int, hidden: int, *, encodes: bool) -> None:
    if not spec.quantization:
        return
    if harm := known_harm(spec.quantization, layers=layers, hidden=hidden, encodes=encodes):
        logger.warning("%s: %s", spec.name, harm)


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
    max_model_len = _max_model_len(spec, model)
    step_tokens = spec.max_num_batched_tokens or (
        CUDA_STEP_TOKENS if device.type == "cuda" else CPU_STEP_TOKENS
    )
    layout = [(layer.num_kv_heads, layer.head_dim) for layer in model.kv_layout]
    block_bytes = kv_block_bytes(layout, spec.block_size, cache_dtype)
    load = largest_load(
        spec,
        shape,
        tokens=step_tokens,
        context=max_model_len,
        dtype_bytes=dtype.itemsize,
        cuda=device.type == "cuda",
    )
    need = scratch(shape, load)
    give_back(device)
    blocks = num_kv_blocks(spec, block_bytes, max_model_len, device, need)
    caches = allocate_caches(layout, blocks, spec.block_size, cache_dtype, device)
    stages.done("memory")
    runner = _runner(spec, model, caches, device, max_model_len)
    runner.prompt_rows = prompt_rows(model.config.vocab_size, cuda=device.type == "cuda")
    if device.type == "cuda":
        sizes = {
            "step_tokens": step_tokens,
            "max_num_seqs": spec.max_num_seqs,
            "max_model_len": max_model_len,
        }
        work = kernel_work(spec, checkpoint, dtype, cache_dtype, sizes)
        _take_all(runner, need, work, sizes, stages, on_compiling)
    require_finite(is_finite(runner), model, spec.model, dtype)
    stages.done("check")
    tokenizer = reading.result()
    eos_ids = _within(eos_token_ids(checkpoint, tokenizer), model.config.vocab_size, spec)
    scheduler = Scheduler(
        BlockPool(blocks),
        block_size=spec.block_size,
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=step_tokens,
        max_model_len=max_model_len,
        eos_ids=eos_ids,
        fingerprint=f"{checkpoint.fingerprint}/{dtype}/{spec.quantization}/{cache_dtype}",
        prefix_caching=spec.prefix_caching,
        reserve=spec.admission == "reserve",
        prefix_regime=_prefix_regime(model),
    )
    compiler = None
    if tokenizer is not None:
        compiler = ConstraintCompiler(
            tokenizer.backend.to_str, vocab_size=model.config.vocab_size, eos_ids=eos_ids
        )
    overlap = device.type == "cuda" if spec.overlap is None else spec.overlap
    summary = {
        **_summary(checkpoint, model, device, dtype),
        "kv_bytes": blocks * block_bytes,
        "kv_tokens": (blocks - 1) * spec.block_size,
        "max_num_batched_tokens": step_tokens,
    }
    ready = Ready(
        engine="dense" if model.config.experts is None else "moe",
        max_model_len=scheduler.max_model_len,
        max_num_seqs=spec.max_num_seqs,
        vocab_size=model.config.vocab_size,
        summary=summary,
    )
    return GenerateCore(runner, scheduler, overlap=overlap, compiler=compiler), ready


def _refuse_early(spec: EngineSpec, checkpoint: Checkpoint, dtype: torch.dtype) -> torch.dtype:
    """The cache's type; what a configuration alone shows to be wrong is refused before gigabytes are read."""
    declared = read_config(checkpoint.config)
    cache_dtype = kv_dtype(spec, checkpoint, declared, dtype)
    _tell_harm(spec, declared.num_layers, declared.hidden_size, encodes=False)
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
    if device.type == "cuda" and not spec.eager and not by_length:
        from headrace.execution.graphs import GraphRunner

        return GraphRunner(model, caches, device=device, **sizes)
    return Runner(model, caches, device=device, rope_by_length=by_length, **sizes)


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
    """Tokens that end an answer: those of generation_config.json and config.json, and the tokenizer's own."""
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
    return tuple(ids)


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """The core needs one for end tokens and grammars only; token ids can be served without."""
    try:
        return Tokenizer.from_path(checkpoint.path)
    except MissingFile:
        return None


def choose_device(spec: EngineSpec) -> torch.device:
    if spec.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device is 'cuda' and torch finds no CUDA device; use device cpu or auto", param="device"
        )
    if spec.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(spec.device)


def choose_dtype(
    spec: EngineSpec, checkpoint: Checkpoint, device: torch.device, *, packs: bool = False
) -> torch.dtype:
    """What was asked for; else what is fast and as right as the weights are.

    On a CPU that is bfloat16 over weights kept in few bits (``packs``: this engine can), and float32 over others.
    """
    if spec.dtype != "auto":
        dtype: torch.dtype = getattr(torch, spec.dtype)
        return dtype
    if device.type == "cpu":
        packed = packs and (spec.quantization or keeps_packed(checkpoint, torch.bfloat16, device))
        return torch.bfloat16 if packed else torch.float32
    stored = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    return torch.float16 if stored == "float16" else torch.bfloat16


def choose_encode_dtype(spec: EngineSpec, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The same for one pass: on GPUs float16 for encoder families, whose sums stay small (three more bits of
    every number than bfloat16, at the same speed), and for decoder families what they were trained in.

    What overflows float16 all the same comes out as an error, never as a vector.
    """
    encoder = not is_causal_family(checkpoint.config)
    if spec.dtype == "auto" and device.type == "cuda" and encoder:
        return torch.float16
    return choose_dtype(spec, checkpoint, device)


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
