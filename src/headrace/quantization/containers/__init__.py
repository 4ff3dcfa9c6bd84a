"""Quantized checkpoints as people publish them, each read by one file, and refused by name where none does."""

from __future__ import annotations

import logging
from collections.abc import Callable

from headrace.checkpoints.base import Checkpoint
from headrace.checkpoints.folder import read_json
from headrace.checkpoints.quantization_rules import check_settings
from headrace.checkpoints.quantization_settings import SIDE_FILE, QuantizationSettings, quantization_settings
from headrace.config.quantization import undeclared_problem
from headrace.errors import UnsupportedCheckpoint
from headrace.quantization.containers.base import Container, QuantizedCheckpoint
from headrace.quantization.containers.bitsandbytes import BitsAndBytes
from headrace.quantization.containers.compressed_tensors import CompressedTensors
from headrace.quantization.containers.fp8 import DeepSeekFp8, FbgemmFp8
from headrace.quantization.containers.gpt_oss import Mxfp4Experts
from headrace.quantization.containers.modelopt import ModelOpt
from headrace.quantization.containers.words import AWQ, GPTQ

__all__ = ["METHODS", "QuantizedCheckpoint", "open_quantized"]

logger = logging.getLogger("headrace.core")

METHODS: dict[str, Callable[[QuantizationSettings, Checkpoint], Container]] = {
    "compressed-tensors": CompressedTensors,
    "modelopt": ModelOpt,
    "modelopt_fp4": ModelOpt,
    "fp8": DeepSeekFp8,
    "fbgemm_fp8": FbgemmFp8,
    "awq": AWQ,
    "bitsandbytes": BitsAndBytes,
    "gptq": GPTQ,
    "mxfp4": Mxfp4Experts,
}


def open_quantized(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself when its weights are plain (or GGUF's), else a reader of its container.

    Raises UnsupportedCheckpoint naming the method and those that are read, or a tensor that is part of a quantized
    matrix of which nothing says how it is packed.
    """
    side = checkpoint.path / SIDE_FILE
    beside = (lambda: read_json(side)) if checkpoint.path.is_dir() and side.is_file() else None
    found = quantization_settings(checkpoint.config, beside)
    if found is None:
        if checkpoint.path.is_dir():
            _check_plain(checkpoint)
        return checkpoint
    for sentence in check_settings(found):
        logger.warning("%s", sentence)
    opened = QuantizedCheckpoint(checkpoint, METHODS[found.method](found, checkpoint))
    if not opened.modules:
        _check_plain(opened)
    return opened


def _check_plain(checkpoint: Checkpoint) -> None:
    tensors = ((name, checkpoint.info(name).dtype) for name in checkpoint.names())
    if problem := undeclared_problem(tensors):
        raise UnsupportedCheckpoint(problem, param="quantization_config")
