"""Measurements of set-ups, kept, and asked for before a set-up serves."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import msgspec
import torch

from headrace.checkpoints.base import Checkpoint
from headrace.config import env
from headrace.config.spec import EngineSpec
from headrace.errors import ConfigError

__all__ = ["Measured", "check_quality", "load_measured", "save_measured"]

logger = logging.getLogger("headrace.core")


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What ``headrace verify`` found.

    Attributes:
        mean_kl: nats.
        defects: sentences about single matrices that are wrong.
    """

    setup: str
    mean_kl: float
    top1: float
    defects: tuple[str, ...] = ()


def _file(spec: EngineSpec, checkpoint: Checkpoint, dtype: torch.dtype, cache: torch.dtype) -> Path:
    key = f"1|{checkpoint.fingerprint}|{spec.quantization}|{dtype}|{cache}"
    return env.home() / "verify" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def save_measured(
    spec: EngineSpec, checkpoint: Checkpoint, dtype: torch.dtype, cache: torch.dtype, measured: Measured
) -> Path:
    """Keep a measurement; a later one of the same set-up replaces it."""
    file = _file(spec, checkpoint, dtype, cache)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_bytes(msgspec.json.encode(measured))
    part.replace(file)
    return file


def load_measured(
    spec: EngineSpec, checkpoint: Checkpoint, dtype: torch.dtype, cache: torch.dtype
) -> Measured | None:
    """The kept measurement of a set-up, or None."""
    file = _file(spec, checkpoint, dtype, cache)
    try:
        return msgspec.json.decode(file.read_bytes(), type=Measured)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise ConfigError(f"{file} is damaged ({error}); run headrace verify again") from None


def check_quality(
    spec: EngineSpec, checkpoint: Checkpoint, dtype: torch.dtype, cache: torch.dtype, *, changed: bool
) -> str | None:
    """Warn or refuse as ``spec.quality`` says; returns the warning.

    Args:
        changed: whether weights or cache are in fewer bits than the model's 16.

    Raises ConfigError with ``quality: refuse`` when no measurement is there, or it is beyond ``spec.max_kl``.
    """
    if spec.quality == "off" or not changed:
        return None
    found = load_measured(spec, checkpoint, dtype, cache)
    problem = None
    if found is None:
        flags = f" --quantization {spec.quantization}" if spec.quantization else ""
        flags += "" if spec.kv_cache_dtype == "auto" else f" --kv-cache-dtype {spec.kv_cache_dtype}"
        problem = f"nobody has measured it here; run: headrace verify {spec.model}{flags}"
    elif found.defects:
        problem = f"headrace verify found {found.defects[0]}"
    elif not found.mean_kl <= spec.max_kl:
        problem = f"its KL divergence from the 16-bit model is {found.mean_kl:.4f} nats, and max_kl is {spec.max_kl:g}"
    if problem is None:
        return None
    sentence = (
        f"quality of {spec.name} ({spec.quantization or checkpoint.path.name}, cache {cache}): {problem}"
    )
    if spec.quality == "refuse":
        raise ConfigError(f"{sentence}; or set quality to warn or off", param="quality")
    logger.warning("%s", sentence)
    return sentence
