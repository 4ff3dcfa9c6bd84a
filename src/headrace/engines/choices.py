"""What a spec leaves open and the machine decides: the device, and the type of numbers."""

from __future__ import annotations

import torch

from headrace.checkpoints.base import Checkpoint
from headrace.config.spec import EngineSpec
from headrace.errors import ConfigError
from headrace.models.encode_choice import is_causal_family
from headrace.quantization.registry import keeps_packed

__all__ = ["choose_device", "choose_dtype", "choose_encode_dtype"]


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
