"""Tiny GGUF files, written with the gguf package so that reading is checked against another implementation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

LLAMA: dict[str, Any] = {
    "block_count": 1,
    "context_length": 128,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
}


def decoder_tensors(
    rng: np.random.Generator, *, arch: str = "llama", vocab: int = 96
) -> dict[str, np.ndarray]:
    """float32 tensors of one layer under GGUF's names, of the sizes of LLAMA."""
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocab, 64),
        "output_norm.weight": (64,),
        "blk.0.attn_norm.weight": (64,),
        "blk.0.ffn_norm.weight": (64,),
        "blk.0.attn_q.weight": (64, 64),
        "blk.0.attn_k.weight": (32, 64),
        "blk.0.attn_v.weight": (32, 64),
        "blk.0.attn_output.weight": (64, 64),
        "blk.0.ffn_gate.weight": (96, 64),
        "blk.0.ffn_up.weight": (96, 64),
        "blk.0.ffn_down.weight": (64, 96),
    }
    if arch.startswith("gemma"):
        shapes |= {"blk.0.post_attention_norm.weight": (64,), "blk.0.post_ffw_norm.weight": (64,)}
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def write_gguf(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    arch: str = "llama",
    keys: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    quantized: Mapping[str, str] | None = None,
) -> Path:
    """A file with ``<arch>.<key>`` metadata and these tensors.

    Args:
        tokenizer: keys under ``tokenizer.``, for instance ``ggml.tokens``.
        quantized: tensor name -> ggml type to store it as.
    """
    writer = gguf.GGUFWriter(str(path), arch)
    for key, value in {**LLAMA, **(keys or {})}.items():
        _add(writer, f"{arch}.{key}", value)
    for key, value in (tokenizer or {}).items():
        _add(writer, f"tokenizer.{key}", value)
    for name, values in tensors.items():
        kind = gguf.GGMLQuantizationType[(quantized or {}).get(name, "F32")]
        packed = values if kind == gguf.GGMLQuantizationType.F32 else gguf.quants.quantize(values, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
