"""Every quantization by name, the hosted system's and ours: which numbers, which layers, which KV cache.

This is the one table: configuration, plan, engines and documentation read it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from headrace.errors import ConfigError, nearest

__all__ = [
    "HOSTED",
    "TYPES",
    "QuantizationType",
    "cache_harm",
    "int8_encoder_problem",
    "is_small",
    "known_harm",
    "no_cache_problem",
    "quantization_type",
    "undeclared_problem",
]

# Endings of tensors that quantized matrices consist of, and of those that are matrices unless they hold codes.
_PACKED = (
    *(".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".absmax", ".SCB", ".W_q"),
    *("_proj_blocks", "_proj_scales"),
)
_MATRIX = (".weight", "_proj")
_CODES = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "F4", "BOOL")

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


# Format of the weights -> what was measured on models of 0.1 and 0.5 B parameters (docs/quantization.md).
_SMALL_HARM = {
    "fp8": "0.035 and 0.010 nats, another likeliest token at 10% and 5% of positions",
    "fp8_block": "0.031 nats, another likeliest token at 9% of positions",
    "nvfp4": "0.23 and 0.056 nats, another likeliest token at 24% and 11% of positions (0.13 and 0.048 calibrated)",
    "mxfp4": "0.57 nats, another likeliest token at 35% of positions",
}


def known_harm(name: str, *, layers: int, hidden: int, encodes: bool) -> str | None:
    """What this type is known to cost a model of this size, as a sentence with the way out; None: nothing known.

    Args:
        encodes: an embedder, classifier or reranker.
    """
    kind = quantization_type(name)
    if encodes:
        if not kind.weights.startswith("fp8"):
            return None
        return (
            f"{name} moves vectors: FP8 keeps three bits after the point, and MiniLM's have cosine 0.994 (the worst of "
            "41 texts; 0.997 on average) with unquantized ones. Use int8, which rotates first: 0.9993 at the same "
            "size; or measure it with headrace verify"
        )
    if not is_small(layers, hidden):
        return None
    measured = _SMALL_HARM.get(kind.weights)
    if measured is None:
        return f"{name}: models of this size lose more by fewer bits than they save; measure it with headrace verify"
    return (
        f"{name} changes the answers of models of this size: KL divergence from 16 bits of {measured}, measured at "
        "0.1 and 0.5 B parameters (bfloat16 itself: 0.001 nats, 2%). Use 16 bits, or int8 (0.005 nats); or measure "
        "it with headrace verify"
    )


def cache_harm(kv_cache_dtype: str, *, qkv_bias: bool) -> str | None:
    """Why keys of this model do not go into such a cache; None: they do."""
    if kv_cache_dtype not in ("fp8", "fp4") or not qkv_bias:
        return None
    name = kv_cache_dtype.upper()
    return (
        f"this model adds a bias to q, k and v, whose outliers an {name} KV cache cannot hold: answers would suffer. "
        "Use kv_cache_dtype auto (with quantization fp8 if you like)"
    )


def undeclared_problem(tensors: Iterable[tuple[str, str]]) -> str:
    """Why these tensors of a checkpoint whose settings quantize none cannot be read; "" when they are plain.

    Args:
        tensors: names, and types as safetensors spells them; "" where only names are known.
    """
    for name, dtype in sorted(tensors):
        if name.endswith(_PACKED) or (dtype in _CODES and name.endswith(_MATRIX)):
            return (
                f"{name!r} is part of a quantized matrix{f' ({dtype})' if dtype else ''}, but config.json has no "
                "quantization_config (nor is there hf_quant_config.json) that says how it is packed: download the "
                "folder again, whole, or take the 16-bit weights"
            )
    return ""


def no_cache_problem(quantization: str, kv_cache_dtype: str) -> str:
    """Why a model of one pass does not take these two, for it has no cache; "" when neither names one."""
    if kv_cache_dtype != "auto":
        return (
            f"kv_cache_dtype is {kv_cache_dtype!r}, and a model of one pass keeps no KV cache; leave it out"
        )
    if quantization and quantization_type(quantization).kv_cache != "auto":
        return (
            f"quantization is {quantization!r}, and a model of one pass keeps no KV cache; use "
            f"{quantization.removesuffix('_kv')!r}"
        )
    return ""


def int8_encoder_problem(*, bfloat16: bool, vnni: bool) -> str:
    """Why ``int8`` does not pay for models of one pass on a CPU; "" when it does.

    Args:
        bfloat16, vnni: what the CPU multiplies (AVX512-BF16, AVX512-VNNI).
    """
    if bfloat16:
        return (
            "quantization is 'int8', and this CPU multiplies bfloat16, in which an encoder is 1.2 times as fast "
            "(measured); MiniLM's vectors have cosine 0.9994 with float32 in int8 and 0.9999 in bfloat16: use dtype "
            "bfloat16 instead"
        )
    if not vnni:
        return (
            "quantization is 'int8', and this CPU has no VNNI instructions: it would be slower than float32; "
            "leave it out"
        )
    return ""
