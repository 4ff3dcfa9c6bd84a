"""From a checkpoint to a loaded encode core."""

from __future__ import annotations

from typing import Any

import torch

from headrace.checkpoints.base import Checkpoint
from headrace.config.plan.memory import CPU_ENCODE_TOKENS, CUDA_ENCODE_TOKENS
from headrace.config.plan.scratch import Load, Scratch, largest_load, scratch
from headrace.config.plan.shape import read_shape
from headrace.config.quantization import int8_encoder_problem, no_cache_problem, quantization_type
from headrace.config.spec import EngineSpec
from headrace.engines.encode import EncodeCore
from headrace.engines.finite import require_finite
from headrace.engines.inspect import inspect
from headrace.engines.memory import give_back, take_for_steps, take_for_weights
from headrace.engines.stages import Stages
from headrace.errors import ConfigError, UnsupportedCheckpoint
from headrace.execution.encode_runner import EncodeRunner
from headrace.execution.gather import gather
from headrace.messages import Ready
from headrace.models.encode_card import read_encode_card
from headrace.models.encode_eight_bits import EightBits
from headrace.models.encode_model import EncodeModel, load_encode_model
from headrace.models.loading import Progress, Transform
from headrace.quantization.containers import QuantizedCheckpoint
from headrace.quantization.registry import load_time
from headrace.text.tokenizer import Tokenizer
from headrace.types import EncodeParams, Request

__all__ = ["build_encode", "check_int8_pays", "load_encode"]

GRAPH_SECONDS = 0.3  # spent on graphs before the first request; others follow while there is none


def build_encode(
    spec: EngineSpec,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    stages: Stages | None = None,
    on_compiling: Progress | None = None,
) -> tuple[EncodeCore[EncodeRunner], Ready]:
    """Load an embedder, classifier or reranker and make its core.

    Raises ModelError or ConfigError with the way out.
    """
    path, stages = checkpoint.path, stages or Stages()
    if not path.is_dir():
        raise UnsupportedCheckpoint(
            f"{path}: embedders are read from folders with config.json and safetensors"
        )
    facts = inspect(path)
    shape = read_shape(facts, encoder=True)
    if not spec.quantization and not isinstance(checkpoint, QuantizedCheckpoint):
        take_for_weights(device, facts, shape, dtype)
    stages.done("device")
    model = load_encode(spec, checkpoint, device, dtype)
    if device.type == "cuda":
        gather(model)  # casts, too, leave holes
    stages.done("weights")
    model.max_tokens = _max_tokens(spec, model)
    batch_tokens = spec.max_num_batched_tokens or (
        CUDA_ENCODE_TOKENS if device.type == "cuda" else CPU_ENCODE_TOKENS
    )
    load = largest_load(
        spec,
        shape,
        tokens=batch_tokens,
        context=model.max_tokens,
        dtype_bytes=dtype.itemsize,
        cuda=device.type == "cuda",
        packed=quantization_type(spec.quantization).weights if spec.quantization else "",
    )
    runner = EncodeRunner(model, device, graphs=False if spec.eager else None)
    overlap = device.type == "cuda" if spec.overlap is None else spec.overlap
    core = EncodeCore(runner, max_tokens=batch_tokens, max_seqs=spec.max_num_seqs, overlap=overlap)
    if device.type == "cuda":
        work = repr((checkpoint.config, model.card, spec.quantization, spec.eager, dtype, load))
        _take_all(runner, scratch(shape, load), load, work, stages, on_compiling)
    require_finite(_is_finite(runner), model, spec.model, dtype)
    stages.done("check")
    summary: dict[str, Any] = {
        "tasks": [task.value for task in model.card.tasks],
        "dimensions": model.dimensions,
        "max_num_batched_tokens": batch_tokens,
    }
    engine = "embed" if model.decoder else "bert"
    return core, Ready(engine, model.max_tokens, spec.max_num_seqs, model.vocab_size, summary)


def load_encode(
    spec: EngineSpec,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    *,
    any_device: bool = False,
) -> EncodeModel:
    """The model of a folder, quantized if the spec says so.

    Args:
        any_device: round on devices that do not multiply eight bits as well, by the kernels' references: slow, and
            the same numbers (for ``headrace verify``).
    Raises ModelError or ConfigError with the way out.
    """
    path = checkpoint.path
    eight_bits, transform = _quantization(spec, device, any_device)
    card = read_encode_card(path, pooling=spec.pooling)
    asks = card.kind == "yes_no" and card.yes_no is None
    return load_encode_model(
        path,
        checkpoint,
        dtype=dtype,
        device=device,
        pooling=spec.pooling,
        yes_no=_answers(Tokenizer.from_path(path)) if asks else None,
        transform=transform,
        eight_bits=eight_bits,
    )


def _is_finite(runner: EncodeRunner) -> bool:
    """Whether what the model makes of one token is made of numbers."""
    task = next(iter(runner.model.card.tasks))
    request = Request(id="first", token_ids=(0,), encode=EncodeParams(task=task))
    return not any(output.error for output in runner.run([request]))


def _take_all(
    runner: EncodeRunner,
    need: Scratch,
    load: Load,
    work: str,
    stages: Stages,
    on_compiling: Progress | None,
) -> None:
    """Take what serving will ever need of the device, so that it never asks for more."""
    from headrace.execution.encode_warm_up import largest, prepare_kernels, run_once

    prepare_kernels(runner, work, load.tokens, load.rows, on_compiling)
    stages.done("kernels")
    give_back(runner.device)  # what loading and rehearsals left, before what is taken for good
    take_for_steps(runner.device, need, runner.graphs)
    stages.done("memory")
    if runner.graphs is not None:
        runner.graphs.warm_up(GRAPH_SECONDS)
    run_once(runner, largest(runner, load.tokens))
    stages.done("warm-up")


def check_int8_pays(spec: EngineSpec, device: torch.device) -> None:
    """Refuse int8 on CPUs where something else is faster and nearer. Raises ConfigError with the figures."""
    if spec.quantization != "int8" or device.type != "cpu":
        return
    problem = int8_encoder_problem(
        bfloat16=torch.cpu._is_avx512_bf16_supported(), vnni=torch.cpu._is_vnni_supported()
    )
    if problem:
        raise ConfigError(problem, param="quantization")


def _quantization(
    spec: EngineSpec, device: torch.device, any_device: bool
) -> tuple[EightBits | None, Transform | None]:
    """Weights and activations in eight bits where the device multiplies them, else weights alone (decoders only)."""
    if problem := no_cache_problem(spec.quantization, spec.kv_cache_dtype):
        raise ConfigError(
            problem, param="quantization" if spec.kv_cache_dtype == "auto" else "kv_cache_dtype"
        )
    if not spec.quantization:
        return None, None
    kind = quantization_type(spec.quantization)
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    if kind.weights == "fp8" and kind.activations and (hopper or any_device):
        return EightBits("fp8", kind.layers == "mlp"), None
    if kind.weights == "int8" and (hopper or any_device or device.type == "cpu"):
        return EightBits("int8"), None
    swap = load_time(kind, device)
    return None, lambda path, linear: linear if path == "head" else swap(path, linear)


def _answers(tokenizer: Tokenizer) -> tuple[int, int]:
    """Token ids of the answers of a generative reranker."""
    yes, no = tokenizer.token_to_id("yes"), tokenizer.token_to_id("no")
    if yes is None or no is None:
        raise UnsupportedCheckpoint(
            "--pooling yes_no needs the answers yes and no to be single tokens, and this tokenizer has none",
            param="pooling",
        )
    return yes, no


def _max_tokens(spec: EngineSpec, model: EncodeModel) -> int:
    if spec.max_model_len is None:
        return model.max_tokens
    if spec.max_model_len > model.max_tokens:
        raise ConfigError(
            f"max_model_len is {spec.max_model_len}; this checkpoint takes {model.max_tokens} tokens "
            "(max_seq_length of sentence_bert_config.json, else the smaller of config.json's max_position_embeddings "
            "and tokenizer_config.json's model_max_length)",
            param="max_model_len",
        )
    return spec.max_model_len
