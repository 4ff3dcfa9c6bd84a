"""A decoder's weights in the form that the spec asks for, and the KV cache's number format."""

from __future__ import annotations

import logging

import torch

from headrace.checkpoints.base import Checkpoint
from headrace.checkpoints.resolve import open_checkpoint, resolve
from headrace.config.quantization import cache_harm, quantization_type
from headrace.config.spec import EngineSpec
from headrace.errors import ConfigError
from headrace.kernels.attention.fp4 import FP4, GROUP
from headrace.models.declaration import DecoderConfig
from headrace.models.decoder import DecoderModel
from headrace.models.loading import Progress, load_decoder
from headrace.quantization.containers import QuantizedCheckpoint, open_quantized
from headrace.quantization.registry import keeps_packed, load_time

__all__ = ["kv_dtype", "load_weights", "open_weights"]

logger = logging.getLogger("headrace.core")

_KV_TYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "fp4": FP4,
}


def open_weights(spec: EngineSpec) -> Checkpoint:
    """The checkpoint of ``spec``, whatever container its weights lie in; headers are read only."""
    checkpoint = open_quantized(
        open_checkpoint(
            spec.path if spec.path is not None else resolve(spec.model, spec.revision, spec.secret_name)
        )
    )
    if spec.quantization and isinstance(checkpoint, QuantizedCheckpoint) and checkpoint.modules:
        raise ConfigError(
            f"quantization is {spec.quantization!r}, and the checkpoint is already quantized: {checkpoint.label}. "
            "Leave it out, or give the 16-bit weights",
            param="quantization",
        )
    return checkpoint


def load_weights(
    spec: EngineSpec,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    *,
    as_stored: bool = False,
) -> DecoderModel:
    """The decoder of an opened checkpoint, quantized on the way if the spec says so.

    Args:
        as_stored: matrices of a quantized checkpoint stay as they are, and round activations as it says, where
            this device would dequantize them as they are loaded (for ``headrace verify``).
    """
    transform = load_time(quantization_type(spec.quantization), device) if spec.quantization else None
    stays = as_stored and isinstance(checkpoint, QuantizedCheckpoint)
    keep_packed = transform is None and (stays or keeps_packed(checkpoint, dtype, device))
    if isinstance(checkpoint, QuantizedCheckpoint) and checkpoint.modules and not keep_packed:
        logger.warning(
            "%s: weights in %s are dequantized to %s while they load: no kernel of this device reads them packed",
            spec.name,
            checkpoint.label,
            str(dtype).removeprefix("torch."),
        )
    return load_decoder(
        checkpoint.config,
        checkpoint,
        dtype=dtype,
        device=device,
        progress=progress,
        transform=transform,
        keep_packed=keep_packed,
    )


def kv_dtype(
    spec: EngineSpec, checkpoint: Checkpoint | None, config: DecoderConfig, dtype: torch.dtype
) -> torch.dtype:
    """What keys and values are stored in: as asked, else as the quantization or the checkpoint says, else dtype.

    Raises ConfigError for an unknown type, and for FP8 where it is known to harm: keys of models with a bias in
    q, k and v (Qwen 2) have outliers that FP8 cannot hold beside the rest, and so have those of a checkpoint whose
    calibrated scales say so.
    """
    name = spec.kv_cache_dtype
    source = "kv_cache_dtype"
    if name == "auto" and spec.quantization:
        name, source = quantization_type(spec.quantization).kv_cache, f"quantization {spec.quantization!r}"
    if name == "auto" and isinstance(checkpoint, QuantizedCheckpoint):
        name, source = checkpoint.container.kv_cache, checkpoint.label
        if name == "fp8" and (config.qkv_bias or checkpoint.largest_cache_scale > 1):
            return dtype  # the checkpoint allows it and demands nothing
    if name == "auto":
        return dtype
    if name not in _KV_TYPES:
        raise ConfigError(
            f"kv_cache_dtype is {name!r}; expected auto, {', '.join(_KV_TYPES)}", param="kv_cache_dtype"
        )
    if harm := cache_harm(name, qkv_bias=config.qkv_bias):
        raise ConfigError(f"{source} asks for an {name.upper()} KV cache, and {harm}", param="kv_cache_dtype")
    if name == "fp8" and isinstance(checkpoint, QuantizedCheckpoint) and checkpoint.largest_cache_scale > 1:
        raise ConfigError(
            f"{source} asks for an FP8 KV cache, which holds numbers up to 448, and this checkpoint was calibrated for "
            f"larger ones (a scale of {checkpoint.largest_cache_scale:g}): use kv_cache_dtype auto",
            param="kv_cache_dtype",
        )
    if name == "fp4" and config.head_dim % GROUP:
        raise ConfigError(
            f"{source} asks for an FP4 KV cache, which takes heads of a multiple of {GROUP} dimensions; use fp8",
            param="kv_cache_dtype",
        )
    return _KV_TYPES[name]
