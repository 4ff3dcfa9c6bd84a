"""Every quantization by name, the hosted system's and ours: which numbers, which layers, which KV cache.

This is the one table: configuration, plan, engines and documentation read it.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from headrace.errors import ConfigError, nearest

__all__ = ["HOSTED", "TYPES", "QuantizationType", "is_small", "quantization_type"]

_SMALL = 60_000  # layers times hidden size: some 3 B parameters


class QuantizationType(msgspec.Struct, frozen=True):
    """What a name stands for.

    Attributes:
        weights: format of the converted matrices: ``fp8`` (E4M3, a scale a row), ``fp8_block`` (128 x 128),
            ``nvfp4``, ``mxfp4``, ``int8`` (a scale a row), ``int4``, ``int4-g64``, ``int4-g128``.
        layers: ``all`` linear layers of the blocks, or those of the ``mlp``. Embeddings, heads, norms and routers
            always stay in 16 bits.
        kv_cache: ``auto`` (as the activations) or ``fp8``.
        activations: whether the input of a converted layer is rounded to FP8 too (where the device multiplies
            FP8); else weights only.
        about: one line for people.
    """

    weights: str
    layers: Literal["all", "mlp"] = "all"
    kv_cache: str = "auto"
    activations: bool = False
    about: str = ""


_FP8 = QuantizationType("fp8", activations=True, about="FP8 weights and activations")
_FP4 = QuantizationType("nvfp4", about="NVFP4 weights, 16-bit activations")
_INT8 = QuantizationType("int8", about="8-bit integer weights")
_INT4 = QuantizationType("int4", about="4-bit integer weights")


def _with(base: QuantizationType, about: str, **changes: str) -> QuantizationType:
    return msgspec.structs.replace(base, about=f"{base.about}; {about}", **changes)


TYPES: dict[str, QuantizationType] = {
    "fp8": _FP8,
    "fp8_kv": _with(_FP8, "FP8 KV cache", kv_cache="fp8"),
    "fp8_mlp_only": _with(_FP8, "MLP layers only", layers="mlp"),
    "fp8_block": QuantizationType(
        "fp8_block", activations=True, about="FP8 with scales for 128 x 128 blocks"
    ),
    "fp4": _FP4,
    "fp4_kv": _with(_FP4, "FP8 KV cache", kv_cache="fp8"),
    "fp4_mlp_only": _with(_FP4, "MLP layers only", layers="mlp"),
    "nvfp4": _FP4,
    "nvfp4_mlp_only": _with(_FP4, "MLP layers only", layers="mlp"),
    "mxfp4": QuantizationType("mxfp4", about="MXFP4 weights, 16-bit activations"),
    "int8": _INT8,
    "int4": _INT4,
    "int4-g64": QuantizationType("int4-g64", about="4-bit integer weights, groups of 64"),
    "int4-g128": QuantizationType("int4-g128", about="4-bit integer weights, groups of 128"),
}

HOSTED: dict[str, tuple[str, str]] = {
    "fp8": ("fp8", "auto"),
    "fp8_kv": ("fp8", "fp8"),
    "fp8_mlp_only": ("fp8_mlp_only", "auto"),
    "fp4": ("nvfp4", "auto"),
    "fp4_kv": ("nvfp4", "fp8"),
    "fp4_mlp_only": ("nvfp4_mlp_only", "auto"),
    "weights_int8": ("int8", "auto"),
    "weights_kv_int8": ("int8", "auto"),
    "smooth_quant": ("int8", "auto"),
    "weights_int4": ("int4", "auto"),
    "weights_int4_kv_int8": ("int4", "auto"),
}
"""``quantization_type`` of the hosted system -> our type and KV cache. INT8 caches and activations stay in 16 bits."""


def quantization_type(name: str) -> QuantizationType:
    """The type of this name. Raises ConfigError naming near ones."""
    found = TYPES.get(name)
    if found is None:
        raise ConfigError(
            f"quantization {name!r} is unknown{nearest(name, TYPES)}; expected one of {', '.join(TYPES)}, or "
            "nothing for the checkpoint's own format",
            param="quantization",
        )
    return found


def is_small(layers: int, hidden: int) -> bool:
    """Whether a model is of a size that fewer bits are known to hurt (docs/quantization.md has measurements)."""
    return layers * hidden < _SMALL
