"""What can be configured but is not done yet: refused, or named, never dropped in silence.

Whoever makes the server honour a field of EngineSpec takes its row out; a test reminds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from headrace.config.quantization import TYPES
from headrace.config.spec import Calibration, EngineSpec
from headrace.errors import ConfigError

__all__ = ["GAPS", "Gap", "gaps", "require_supported"]


class Gap(msgspec.Struct, frozen=True):
    """A field with values that this version does not do.

    Attributes:
        field: of EngineSpec.
        wanted: whether this value asks for it.
        why: one clause.
        blocks: answers or memory would not be what was asked for, so the server refuses to start; else only
            speed differs, or nothing.
        way: what to do instead.
    """

    field: str
    wanted: Callable[[Any], bool]
    why: str
    blocks: bool = True
    way: str = "leave it out"


_ONE_GPU = "set it to 1, and one GPU"


def _is_set(value: Any) -> bool:
    return bool(value)


def _many(value: Any) -> bool:
    return value is not None and value > 1


GAPS = (
    Gap("quantization", lambda value: bool(value) and value not in TYPES, "weights stay as they are"),
    Gap(
        "kv_cache_dtype",
        lambda value: value not in ("auto", "fp8", "fp4", "bfloat16", "float16", "float32"),
        "the KV cache has the type of the activations",
    ),
    Gap("tensor_parallel_size", _many, "one GPU a model", way=_ONE_GPU),
    Gap("pipeline_parallel_size", _many, "one GPU a model", way=_ONE_GPU),
    Gap("expert_parallel_size", _many, "one GPU a model", way=_ONE_GPU),
    Gap("adapters", _is_set, "no LoRA adapters"),
    Gap(
        "source",
        lambda value: value not in ("auto", "HF", "LOCAL"),
        "checkpoints come from the hub or this machine",
        way="fetch it, and name its folder with source LOCAL",
    ),
    Gap("speculation", _is_set, "no drafts: the same output, at the usual speed", False),
    Gap("seed", _is_set, "requests without a seed draw one", False),
    Gap("allow_patterns", _is_set, "the files that are needed are fetched", False),
    Gap("ignore_patterns", _is_set, "the files that are needed are fetched", False),
    Gap(
        "calibration",
        lambda value: value != Calibration(),
        "types that are made while loading need no data; `headrace quantize` calibrates",
        False,
    ),
    Gap("max_lora_rank", lambda value: False, "no LoRA adapters", False),
    Gap("chunked_prefill", lambda value: not value, "long prompts are always split", False),
    Gap("host_kv_bytes", _is_set, "blocks that leave the device are computed again", False),
    Gap("secrets", lambda value: False, "looked up when needed; `serve` names those that are missing", False),
)


def gaps(spec: EngineSpec) -> list[tuple[Gap, str]]:
    """Rows that this specification runs into, each with a sentence."""
    found = []
    for gap in GAPS:
        value = getattr(spec, gap.field)
        if gap.wanted(value):
            shown = f" {value!r}" if isinstance(value, (str, int, bool)) and value is not True else ""
            found.append((gap, f"{gap.field}{shown} is not in this version: {gap.why}"))
    return found


def require_supported(spec: EngineSpec) -> None:
    """Refuse what would silently be served otherwise. Raises ConfigError with every reason."""
    problems = [f"{sentence}; {gap.way}" for gap, sentence in gaps(spec) if gap.blocks]
    if problems:
        raise ConfigError(problems, param=problems[0].split()[0])
