"""Quantized checkpoints as people publish them, each read by one file, and refused by name where none does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from headrace.checkpoints.base import Checkpoint
from headrace.checkpoints.folder import read_json
from headrace.errors import UnsupportedCheckpoint, nearest
from headrace.quantization.containers.base import Container, QuantizedCheckpoint
from headrace.quantization.containers.compressed_tensors import CompressedTensors
from headrace.quantization.containers.fp8 import DeepSeekFp8
from headrace.quantization.containers.gpt_oss import Mxfp4Experts
from headrace.quantization.containers.modelopt import ModelOpt
from headrace.quantization.containers.words import AWQ, GPTQ

__all__ = ["METHODS", "QuantizedCheckpoint", "open_quantized"]

METHODS: dict[str, Callable[[Mapping[str, Any], Checkpoint, str], Container]] = {
    "compressed-tensors": CompressedTensors,
    "modelopt": ModelOpt,
    "modelopt_fp4": ModelOpt,
    "fp8": DeepSeekFp8,
    "awq": AWQ,
    "gptq": GPTQ,
    "mxfp4": Mxfp4Experts,
}
_SIDE_FILE = "hf_quant_config.json"


def open_quantized(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself when its weights are plain (or GGUF's), else a reader of its container.

    Raises UnsupportedCheckpoint naming the method and those that are read.
    """
    settings = checkpoint.config.get("quantization_config")
    where = "config.json: quantization_config"
    if settings is None:
        side = checkpoint.path / _SIDE_FILE
        if checkpoint.path.is_dir() and side.is_file():
            inner = read_json(side).get("quantization")
            if not isinstance(inner, dict):
                raise UnsupportedCheckpoint(f"{side} has no block 'quantization'", param=_SIDE_FILE)
            return QuantizedCheckpoint(checkpoint, ModelOpt(inner, checkpoint, _SIDE_FILE))
        return checkpoint
    if not isinstance(settings, dict):
        raise UnsupportedCheckpoint(
            f"{where} is {settings!r}; expected an object", param="quantization_config"
        )
    method = str(settings.get("quant_method", "")).lower()
    if method not in METHODS:
        raise UnsupportedCheckpoint(
            f"{where}.quant_method is {method!r}{nearest(method, METHODS)}; "
            f"read are {', '.join(sorted(METHODS))} and GGUF files. Take another quantization of this model, or "
            "its 16-bit weights with --quantization",
            param="quantization_config",
        )
    return QuantizedCheckpoint(checkpoint, METHODS[method](settings, checkpoint, where))
