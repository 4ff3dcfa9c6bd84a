"""The one frozen configuration object that everything below the edge reads."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

__all__ = ["DType", "Device", "Engine", "EngineSpec"]

Engine = Literal["auto", "bert", "embed", "dense", "moe"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]


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
        memory_fraction: of the device's free memory that weights, activations and KV may take.
        num_threads: CPU threads of the core; None: all cores.
        overlap: prepare step n+1 while the device runs step n; None: on where there is a device.
        deterministic: shape-independent reductions.
        eager: no CUDA graphs.
        pooling: for embedders whose checkpoint does not say.
        chat_template: file or text that replaces the checkpoint's own.
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
    deterministic: bool = False
    eager: bool = False
    seed: int = 0
    tensor_parallel_size: int = 1
    pooling: str | None = None
    chat_template: str | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None

    @property
    def name(self) -> str:
        """The canonical served name."""
        return self.served_names[0] if self.served_names else self.model
