"""Packed weights as compressed-tensors stores them: names, packing, and the block of config.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headrace.config.quantization import QuantizationType
from headrace.quantization.scaled import QuantizedWeight
from headrace.quantization.schemes.fp4 import NVFP4_GROUP, Fp4Weight, quantize_mxfp4, quantize_nvfp4
from headrace.quantization.schemes.fp8 import Fp8Weight, quantize_fp8
from headrace.quantization.schemes.group_int import GroupIntWeight, quantize_group_int

__all__ = ["WRITABLE", "packed_tensors", "quantization_config", "round_weight"]

_INT4_GROUPS = {"int4": 32, "int4-g64": 64, "int4-g128": 128}
WRITABLE = ("fp8", "fp8_block", "nvfp4", "mxfp4", "int8", *_INT4_GROUPS)


def round_weight(weight: Tensor, form: str, importance: Tensor | None = None) -> QuantizedWeight:
    """One matrix [rows, columns] in a format of WRITABLE. Raises UnsupportedCheckpoint when its shape forbids it."""
    if form == "fp8":
        return quantize_fp8(weight)
    if form == "fp8_block":
        return quantize_fp8(weight, "block")
    if form == "nvfp4":
        return quantize_nvfp4(weight, importance)
    if form == "mxfp4":
        return quantize_mxfp4(weight, importance)
    if form == "int8":
        return quantize_group_int(weight, 8, weight.shape[1])
    return quantize_group_int(weight, 4, _INT4_GROUPS[form], importance)


def packed_tensors(base: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """What is written for the module ``base``."""
    match weight:
        case Fp8Weight():
            return {f"{base}.weight": weight.codes, f"{base}.weight_scale": weight.scale}
        case Fp4Weight():
            stored = {f"{base}.weight_packed": weight.packed, f"{base}.weight_scale": weight.scale}
            if weight.group == NVFP4_GROUP:
                stored[f"{base}.weight_global_scale"] = (1.0 / weight.row_scale[:1].double()).float()
            return stored
        case GroupIntWeight():
            codes = weight.values() if weight.bits == 4 else weight.codes
            return {
                f"{base}.weight_packed": _words(codes, weight.bits),
                f"{base}.weight_shape": torch.tensor(weight.shape),
                f"{base}.weight_scale": weight.scale,
            }


def _words(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, columns] -> int32 words, the first code in the lowest bits."""
    per_word = 32 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word)).unflatten(1, (-1, per_word))
    shifted = padded.long() << (torch.arange(per_word) * bits)
    words: Tensor = shifted.sum(-1).to(torch.int32)  # wraps as two's complement does
    return words


_STORED: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8_block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
         "scale_dtype": "torch.float8_e4m3fn"},
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    ),
    "int8": ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    **{
        form: ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": size})
        for form, size in _INT4_GROUPS.items()
    },
}  # fmt: skip
"""Of each form the ``format`` and what is particular to ``weights``, in the words of compressed-tensors."""


def quantization_config(
    kind: QuantizationType, ignored: Sequence[str], *, static: bool = False
) -> dict[str, Any]:
    """The ``quantization_config`` of config.json.

    Args:
        ignored: linear modules that stay in 16 bits.
        static: FP8 activations have one scale a module, stored as ``input_scale``.
    """
    stored, particular = _STORED[kind.weights]
    group = {
        "targets": ["Linear"],
        "weights": {"symmetric": True, "dynamic": False, "observer": "minmax", **particular},
        "input_activations": _activations(kind.weights, static=static),
        "output_activations": None,
        "format": stored,
    }
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignored),
        "kv_cache_scheme": cache if kind.kv_cache == "fp8" else None,
    }


def _activations(form: str, *, static: bool) -> dict[str, Any] | None:
    if form not in ("fp8", "fp8_block"):
        return None
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"}
    if static:
        inputs |= {"dynamic": False, "strategy": "tensor"}
    if form == "fp8_block":
        inputs |= {"strategy": "group", "group_size": 128}
    return inputs
