"""Where a checkpoint says how its weights are quantized, in the places that publishers put it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from headrace.errors import UnsupportedCheckpoint, nearest

__all__ = [
    "KEYS",
    "METHODS",
    "SIDE_FILE",
    "QuantizationSettings",
    "check_method",
    "quantization_settings",
    "without_quantization",
]

METHODS = (
    "awq",
    "bitsandbytes",
    "compressed-tensors",
    "fbgemm_fp8",
    "fp8",
    "gptq",
    "modelopt",
    "modelopt_fp4",
    "mxfp4",
)
SIDE_FILE = "hf_quant_config.json"  # ModelOpt's
KEYS = ("quantization_config", "compression_config")  # the second is compressed-tensors' older name
_INNER = ("text_config", "llm_config", "language_config")


class QuantizationSettings(NamedTuple):
    """What declares a checkpoint's quantization.

    Attributes:
        method: ``quant_method`` in small letters, ``modelopt`` where only that tool's keys are there; "" when missing.
        values: the block, flat.
        where: file and key, for messages.
        source: the file.
    """

    method: str
    values: dict[str, Any]
    where: str
    source: str


def quantization_settings(
    config: Mapping[str, Any], side: Callable[[], dict[str, Any]] | None
) -> QuantizationSettings | None:
    """The block of config.json (or of its language model's part), else of hf_quant_config.json; None: plain weights.

    Args:
        side: reads hf_quant_config.json; None where there is none.

    Raises UnsupportedCheckpoint for a block that is no object.
    """
    for owner, path in (
        (config, "config.json"),
        *((config.get(name), f"config.json: {name}") for name in _INNER),
    ):
        for key in KEYS:
            if isinstance(owner, Mapping) and owner.get(key) is not None:
                where = f"{path}.{key}" if ":" in path else f"{path}: {key}"
                return _block(owner[key], where, "config.json")
    if side is None:
        return None
    found = _block(side().get("quantization"), f"{SIDE_FILE}: quantization", SIDE_FILE)
    # Weights that are in 8 bits though only a KV cache is quantized find no place for their scales.
    said = found.values.get("quant_algo") or found.values.get("kv_cache_quant_algo")
    return found._replace(method="modelopt") if said else None


def _block(values: object, where: str, source: str) -> QuantizationSettings:
    if not isinstance(values, Mapping):
        raise UnsupportedCheckpoint(
            f"{where} is {values!r}; expected an object that says how weights are quantized",
            param="quantization_config",
        )
    inner = values.get("quantization")
    flat = {**values, **inner} if isinstance(inner, Mapping) else dict(values)
    flat.pop("quantization", None)
    method = str(flat.get("quant_method") or "").lower()
    if not method and (flat.get("quant_algo") or flat.get("kv_cache_quant_algo")):
        method = "modelopt"
    return QuantizationSettings(method, flat, where, source)


def check_method(found: QuantizationSettings) -> None:
    """Raises UnsupportedCheckpoint, naming those that are read, for a method that is not."""
    if found.method not in METHODS:
        raise UnsupportedCheckpoint(
            f"{found.where}.quant_method is {found.method!r}{nearest(found.method, METHODS)}; "
            f"read are {', '.join(METHODS)} and GGUF files. Take another quantization of this model, or "
            "its 16-bit weights with --quantization",
            param="quantization_config",
        )


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without what was said of quantization, at whatever level."""
    return {
        key: without_quantization(value) if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in config.items()
        if key not in KEYS
    }
