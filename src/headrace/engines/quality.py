"""Measurements of set-ups, kept, and asked for before a set-up serves."""

from __future__ import annotations

import hashlib
import logging
import shlex
from pathlib import Path

import msgspec
import torch

from headrace.checkpoints.base import Checkpoint
from headrace.config import env
from headrace.config.quantization import known_harm
from headrace.config.spec import EngineSpec
from headrace.errors import ConfigError
from headrace.kernels.attention.fp4 import FP4
from headrace.quantization.containers import QuantizedCheckpoint

__all__ = [
    "MAX_DIFFERENCE",
    "MIN_INPUTS",
    "MIN_TOKENS",
    "Measured",
    "blind_spots",
    "check_quality",
    "describe",
    "load_measured",
    "save_measured",
    "tell_harm",
    "too_small",
]

MAX_DIFFERENCE = 0.02  # of a classifier's probability or a reranker's score
# What a measurement must rest on to count for ``quality``; the packaged texts give some 1,100 tokens, and 41 inputs.
MIN_TOKENS = 500
MIN_INPUTS = 20  # of a model of one pass

logger = logging.getLogger("headrace.core")


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What ``headrace verify`` found.

    Attributes:
        tokens: positions of a generating model that were compared, or tokens of a model of one pass's inputs.
        inputs: of a model of one pass; None: it generates.
        mean_kl, top1: of a generating model: nats, and share of positions with the same likeliest token.
        min_cosine, max_difference: of an embedder's vectors, and of a classifier's probabilities.
        defects: sentences about single matrices that are wrong.
    """

    setup: str
    tokens: int
    inputs: int | None = None
    mean_kl: float | None = None
    top1: float | None = None
    min_cosine: float | None = None
    max_difference: float | None = None
    defects: tuple[str, ...] = ()


def describe(
    spec: EngineSpec, checkpoint: Checkpoint, dtype: torch.dtype, cache: torch.dtype | None = None
) -> str:
    """A set-up, for people."""
    form = spec.quantization or (checkpoint.label if isinstance(checkpoint, QuantizedCheckpoint) else "")
    name, *rest = ("fp4" if kind is FP4 else str(kind).removeprefix("torch.") for kind in (dtype, cache))
    held = "" if cache is None else f", cache {rest[0]}"
    return f"{spec.name}: {form + ', ' if form else ''}{name}{held}"


def blind_spots(checkpoint: Checkpoint, reference: Checkpoint) -> tuple[str, ...]:
    """What a comparison of these two cannot tell; such a one is no proof for ``quality``."""
    if not isinstance(reference, QuantizedCheckpoint) or not reference.modules:
        return ()
    itself = checkpoint.fingerprint == reference.fingerprint
    return (
        f"the reference is {'this checkpoint itself' if itself else 'quantized too'}, dequantized: what rounding its "
        "weights lost is not seen, and the result is not kept for serve. Give the 16-bit model with --reference",
    )


def too_small(tokens: int, inputs: int | None = None) -> str:
    """Why a measurement on so few texts shows nothing for ``quality``, after "it"; "" when there are enough."""
    if tokens >= MIN_TOKENS and (inputs is None or inputs >= MIN_INPUTS):
        return ""
    measured, needed = f"{tokens} token{'s' * (tokens != 1)}", f"{MIN_TOKENS}"
    if inputs is not None:
        measured = f"{inputs} input{'s' * (inputs != 1)} of {measured}"
        needed = f"{MIN_INPUTS} inputs of {MIN_TOKENS} tokens together"
    return f"was measured on {measured}, and quality takes at least {needed} (the packaged texts have them)"


def _file(spec: EngineSpec, checkpoint: Checkpoint, dtype: torch.dtype, cache: torch.dtype) -> Path:
    key = f"2|{checkpoint.fingerprint}|{spec.quantization}|{dtype}|{cache}"
    return env.home() / "verify" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def save_measured(
    spec: EngineSpec, checkpoint: Checkpoint, dtype: torch.dtype, cache: torch.dtype, measured: Measured
) -> Path | None:
    """Keep a measurement; a later one of the same set-up replaces it, unless only the earlier is large enough for
    ``quality``. None, and a warning, where it cannot be kept.
    """
    file = _file(spec, checkpoint, dtype, cache)
    if too_small(measured.tokens, measured.inputs) and _counts(file):
        return file
    part = file.with_suffix(".part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(msgspec.json.encode(measured))
        part.replace(file)
    except OSError as error:
        logger.warning("the result is not kept for serve: %s: %s", file.parent, error.strerror)
        return None
    return file


def _counts(file: Path) -> bool:
    """Whether a measurement that is large enough for ``quality`` lies there."""
    try:
        found = msgspec.json.decode(file.read_bytes(), type=Measured)
    except (OSError, msgspec.DecodeError):
        return False
    return not too_small(found.tokens, found.inputs)


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
    """Warn or refuse as ``spec.quality`` says; returns the warning. What was found to be bad is told even if ``off``.

    Args:
        cache: of keys and values; ``dtype`` for models without a cache.
        changed: whether weights or cache are in fewer bits than the model's 16.

    Raises ConfigError with ``quality: refuse`` when no measurement is there, or it is beyond the limits or too small.
    """
    if not changed:
        return None
    found = load_measured(spec, checkpoint, dtype, cache)
    if found is None and spec.quality == "off":
        return None
    if found is None:
        problem = f"nobody has measured it here; run: {_command(spec, checkpoint)}"
    else:
        problem = _beyond(found, spec)
        if not problem and spec.quality != "off" and (few := too_small(found.tokens, found.inputs)):
            problem = f"it {few}; run: {_command(spec, checkpoint)}"
    if not problem:
        return None
    held = "" if cache is dtype else f", cache {cache}"
    sentence = f"quality of {spec.name} ({spec.quantization or checkpoint.path.name}{held}): {problem}"
    if spec.quality == "refuse":
        raise ConfigError(f"{sentence}; or set quality to warn or off", param="quality")
    logger.warning("%s", sentence)
    return sentence


def _command(spec: EngineSpec, checkpoint: Checkpoint) -> str:
    """What measures this set-up, on the packaged texts."""
    words = ["headrace", "verify", spec.model]
    for name in ("revision", "device", "dtype", "quantization", "kv_cache_dtype", "pooling"):
        value = getattr(spec, name)
        if value not in (None, "", "auto"):
            words += ["--" + name.replace("_", "-"), str(value)]
    words += ["--reference", "THE_16_BIT_MODEL"] if isinstance(checkpoint, QuantizedCheckpoint) else []
    return shlex.join(words)


def _beyond(found: Measured, spec: EngineSpec) -> str:
    """What is wrong, "" for nothing."""
    if found.defects:
        return f"headrace verify found {found.defects[0]}"
    if found.mean_kl is not None and not found.mean_kl <= spec.max_kl:
        kl = f"its KL divergence from the 16-bit model is {found.mean_kl:.4f} nats, and max_kl is {spec.max_kl:g}"
        return (
            kl if found.top1 is None else f"{kl} (the same likeliest token at {found.top1:.1%} of positions)"
        )
    if found.min_cosine is not None and not found.min_cosine >= spec.min_cosine:
        return (
            f"its vectors have cosine {found.min_cosine:.5f} with the unquantized model's, and min_cosine is "
            f"{spec.min_cosine:g}"
        )
    if found.max_difference is not None and not found.max_difference <= MAX_DIFFERENCE:
        return f"a probability of its is off by {found.max_difference:.3f} from the unquantized model's"
    return ""


def tell_harm(spec: EngineSpec, layers: int, hidden: int, *, encodes: bool) -> None:
    """Warn of what is known of the type's harm to models of this size."""
    if not spec.quantization:
        return
    if harm := known_harm(spec.quantization, layers=layers, hidden=hidden, encodes=encodes):
        logger.warning("%s: %s", spec.name, harm)
