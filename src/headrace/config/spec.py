"""The one frozen configuration object that everything below the edge reads."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

__all__ = [
    "Adapter",
    "Admission",
    "Calibration",
    "DType",
    "Device",
    "Engine",
    "EngineSpec",
    "Source",
    "Speculation",
    "lookahead_draft_length",
]

# "decoder" (dense or moe) and "encoder" (embed or bert) are requests; selection replaces them.
Engine = Literal["auto", "bert", "embed", "dense", "moe", "decoder", "encoder", "speech"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
Source = Literal["auto", "HF", "GCS", "S3", "AZURE", "REMOTE_URL", "BASETEN_TRAINING", "LOCAL"]
Admission = Literal["reserve", "fill"]


def lookahead_draft_length(window: int, ngram: int, verification: int) -> int:
    """Draft tokens of one lookahead step, as the hosted system counts them."""
    return (0 if ngram == 1 else ngram - 2) + (window - 1 + verification) * (ngram - 1)


class Speculation(msgspec.Struct, frozen=True, kw_only=True):
    """How drafts are made. Speculation never changes what is returned.

    Attributes:
        max_draft_tokens: longest draft of one step; 0: chosen by the drafter.
        window, ngram, verification: of lookahead decoding (Fu et al. 2024).
        model: draft model or head, for ``eagle`` and ``draft``.
        num_layers: prediction layers used, for ``mtp``.
    """

    method: Literal["lookahead", "ngram", "eagle", "mtp", "draft"]
    max_draft_tokens: int = 0
    window: int = 0
    ngram: int = 0
    verification: int = 0
    model: str = ""
    num_layers: int = 0


class Adapter(msgspec.Struct, frozen=True, kw_only=True):
    """A LoRA adapter and the name by which requests ask for it."""

    name: str
    model: str
    source: Source = "auto"
    revision: str | None = None
    secret_name: str = "hf_access_token"


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """Data for a quantization that needs some."""

    dataset: str = "abisee/cnn_dailymail"
    num_rows: int = 1024
    max_tokens: int = 1536


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an engine core needs to know. Resolved once, from YAML, flags or Python.

    Attributes:
        model: folder, GGUF file, packaged name or hub id.
        path: where its files lie on this machine, once resolved.
        served_names: names that clients may use; the first is the canonical one.
        engine: which configuration of which loop; ``auto`` until resolved.
        dtype: of weights and activations; ``auto`` follows checkpoint and device.
        quantization: scheme name, or "" for the checkpoint's own format.
        kv_cache_dtype: ``auto`` is dtype.
        max_model_len: context; None: the checkpoint's own, or less if memory says so.
        max_num_seqs: sequences in one step.
        max_num_batched_tokens: tokens in one step; None: by device.
        max_queue: requests waiting for the engine before new ones get 429.
        block_size: tokens of one KV block.
        kv_cache_bytes: size of the KV pool; None: by memory_fraction.
        memory_fraction: of a GPU's memory, all of it, that the server may take: process, weights, activations and KV.
        num_threads: CPU threads of the core; None: all cores.
        overlap: prepare step n+1 while the device runs step n; None: on where there is a device.
        quality: whether a measurement by ``headrace verify`` must exist for this quantization and cache: ``off``,
            ``warn`` without one or beyond max_kl, or ``refuse`` to start.
        max_kl: mean KL divergence from the 16-bit model, in nats, that ``quality`` allows.
        min_cosine: least cosine of an embedder's vectors with the unquantized model's that ``quality`` allows.
        deterministic: shape-independent reductions.
        eager: no CUDA graphs.
        pooling: for embedders whose checkpoint does not say.
        chat_template: file or text that replaces the checkpoint's own.
        source: kind of place that ``model`` names; ``auto``: by its form.
        secret_name: of the credentials for ``source``; see config/secrets.py.
        allow_patterns, ignore_patterns: which files of a repository are fetched; empty: all that are needed.
        calibration: for quantizations that need data.
        speculation: drafts, if any.
        adapters: LoRA adapters, loaded at the start.
        max_lora_rank: largest rank that is served.
        chunked_prefill: long prompts are split over steps.
        admission: ``reserve`` room for each whole output, or ``fill`` the cache and preempt when full.
        host_kv_bytes: host memory for KV blocks that left the device.
        default_max_tokens: output limit of requests that set none.
        stop: stop strings of every request.
        auto_truncate: cut inputs of encoders that are too long instead of refusing; None: only for ``bert``.
        default_route: where ``/predict`` of an encoder lands; None: by architecture.
        expert_parallel_size: GPUs that share the experts; None: as tensor_parallel_size.
        secrets: names of secrets that the configuration declares; never values.
        environment: variables for the core's process.
    """

    model: str
    path: Path | None = None
    revision: str | None = None
    served_names: tuple[str, ...] = ()
    engine: Engine = "auto"
    device: Device = "auto"
    dtype: DType = "auto"
    quantization: str = ""
    kv_cache_dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    max_queue: int = 2048
    block_size: int = 16
    kv_cache_bytes: int | None = None
    memory_fraction: float = 0.9
    prefix_caching: bool = True
    num_threads: int | None = None
    overlap: bool | None = None
    quality: Literal["off", "warn", "refuse"] = "off"
    max_kl: float = 0.05
    min_cosine: float = 0.999
    deterministic: bool = False
    eager: bool = False
    seed: int = 0
    tensor_parallel_size: int = 1
    pooling: str | None = None
    chat_template: str | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    source: Source = "auto"
    secret_name: str = "hf_access_token"
    allow_patterns: tuple[str, ...] = ()
    ignore_patterns: tuple[str, ...] = ()
    calibration: Calibration = Calibration()
    speculation: Speculation | None = None
    adapters: tuple[Adapter, ...] = ()
    max_lora_rank: int = 64
    chunked_prefill: bool = True
    admission: Admission = "fill"
    host_kv_bytes: int = 0
    default_max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    auto_truncate: bool | None = None
    default_route: str | None = None
    pipeline_parallel_size: int = 1
    expert_parallel_size: int | None = None
    secrets: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """The canonical served name."""
        return self.served_names[0] if self.served_names else self.model
