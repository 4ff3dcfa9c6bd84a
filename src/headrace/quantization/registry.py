"""Which packed linear a checkpoint's tensor or a user's wish leads to; the loader asks here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from headrace.checkpoints.base import PackedTensor, TensorInfo
from headrace.config.quantization import QuantizationType
from headrace.errors import UnsupportedCheckpoint
from headrace.quantization.containers import QuantizedCheckpoint
from headrace.quantization.experts import PackedExperts, ScaledExperts, multiplies_experts
from headrace.quantization.ggml import KEEPABLE
from headrace.quantization.keep import keeps_quantized
from headrace.quantization.linear import PackedLinear
from headrace.quantization.native_fp4 import can_multiply
from headrace.quantization.scaled import Activations, QuantizedWeight, ScaledLinear, joined_linear
from headrace.quantization.schemes.fp4 import quantize_mxfp4, quantize_nvfp4
from headrace.quantization.schemes.fp8 import quantize_fp8
from headrace.quantization.schemes.group_int import quantize_group_int
from headrace.quantization.schemes.int4 import Int4Linear, fast_on_this_cpu, quantize_int4
from headrace.quantization.schemes.int8 import Int8Linear, quantize_int8

__all__ = ["PackedSource", "Quantizer", "can_keep", "keeps_packed", "load_time"]

# Weight, bias, parts, and how many experts the weight is of (0: it is a plain linear's).
Quantizer = Callable[[Tensor, Tensor | None, tuple[int, ...], int], nn.Module]


@runtime_checkable
class PackedSource(Protocol):
    """A checkpoint that stores some matrices in blocks of few bits."""

    def names(self) -> list[str]: ...

    def info(self, name: str) -> TensorInfo:
        """Shape and stored type."""
        ...

    def load_packed(self, name: str) -> PackedTensor:
        """One matrix as it is stored."""
        ...


def can_keep(info: TensorInfo) -> bool:
    """Whether ``packed_linear`` takes this tensor."""
    return len(info.shape) == 2 and info.dtype in KEEPABLE


def keeps_packed(weights: object, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether packed linears serve this checkpoint better than dense ones: blocks on disk, bfloat16, a fast CPU.

    In float32 the dense weights are used: packed products are rounded to bfloat16.
    """
    if isinstance(weights, QuantizedCheckpoint):
        return keeps_quantized(weights, dtype, device)
    return (
        isinstance(weights, PackedSource)
        and device.type == "cpu"
        and dtype is torch.bfloat16
        and fast_on_this_cpu()
        and any(can_keep(weights.info(name)) for name in weights.names())
    )


def _scaled(weights: str, activations: Activations) -> Quantizer:
    make: dict[str, Callable[[Tensor], QuantizedWeight]] = {
        "fp8": quantize_fp8,
        "fp8_block": lambda weight: quantize_fp8(weight, "block"),
        "nvfp4": quantize_nvfp4,
        "mxfp4": quantize_mxfp4,
        "int8": lambda weight: quantize_group_int(weight, 8, weight.shape[1]),
        "int4": lambda weight: quantize_group_int(weight, 4, 32),
        "int4-g64": lambda weight: quantize_group_int(weight, 4, 64),
        "int4-g128": lambda weight: quantize_group_int(weight, 4, 128),
    }

    def quantize(weight: Tensor, bias: Tensor | None, parts: tuple[int, ...], experts: int) -> nn.Module:
        pieces = _pieces(make[weights], weights, weight, parts)
        build: Callable[..., ScaledLinear] = ScaledLinear
        if experts:
            _check_experts(pieces[0], weight, experts)
            build = partial(ScaledExperts, num_experts=experts)
        joined = joined_linear(pieces, bias=bias, activations=[activations] * len(pieces), build=build)
        assert joined is not None
        return joined

    return quantize


def _pieces(
    make: Callable[[Tensor], QuantizedWeight], form: str, weight: Tensor, parts: tuple[int, ...]
) -> list[QuantizedWeight]:
    """Each part rounded as if it lay in a file of its own; those of experts are many, and some go at once."""
    height = parts[0]
    count = max(1, _AT_ONCE // (height * weight.shape[1]))
    if len(parts) <= 2 or len(set(parts)) > 1 or (form == "fp8_block" and height % 128):
        return [make(part) for part in weight.split(parts)]
    several = weight.split(height * count)
    if form == "nvfp4":
        return [quantize_nvfp4(part, matrices=part.shape[0] // height) for part in several]
    return [make(part) for part in several]


def _check_experts(piece: QuantizedWeight, weight: Tensor, experts: int) -> None:
    rows, columns = piece.shape
    if weight.device.type == "cuda" and not multiplies_experts(piece, 1):
        raise UnsupportedCheckpoint(
            f"quantization: experts' matrices are [{rows}, {columns}], and in 4 bits a GPU needs 16, 32, … rows; "
            "use fp8, int8 or 16 bits",
            param="quantization",
        )


def _int4(group: int) -> Callable[[Tensor, Tensor | None, tuple[int, ...]], PackedLinear]:
    def quantize(weight: Tensor, bias: Tensor | None, parts: tuple[int, ...]) -> PackedLinear:
        return Int4Linear(quantize_int4(weight, group), bias=bias, parts=parts)

    return quantize


def _int8(weight: Tensor, bias: Tensor | None, parts: tuple[int, ...]) -> PackedLinear:
    return Int8Linear(*quantize_int8(weight), bias=bias, parts=parts)


def _by_expert(make: Callable[[Tensor, Tensor | None, tuple[int, ...]], PackedLinear]) -> Quantizer:
    """With a linear an expert."""

    def quantize(weight: Tensor, bias: Tensor | None, parts: tuple[int, ...], experts: int) -> nn.Module:
        if not experts:
            return make(weight, bias, parts)
        own = parts[: len(parts) // experts]
        biases = [None] * experts if bias is None else bias.chunk(experts)
        return PackedExperts([make(part, each, own) for part, each in zip(weight.chunk(experts), biases)])

    return quantize


_CPU: dict[str, Quantizer] = {
    "int8": _by_expert(_int8),
    "int4": _by_expert(_int4(32)),
    "int4-g64": _by_expert(_int4(64)),
    "int4-g128": _by_expert(_int4(128)),
}


def _quantizer(kind: QuantizationType, device: torch.device) -> Quantizer:
    if device.type == "cpu" and kind.weights in _CPU:
        return _CPU[kind.weights]
    if kind.weights == "nvfp4" and can_multiply(device):
        return _scaled(kind.weights, Activations("nvfp4"))
    rounds = kind.activations and (device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9))
    if not rounds:
        return _scaled(kind.weights, Activations())
    return _scaled(kind.weights, Activations("group" if kind.weights == "fp8_block" else "token"))


_AT_ONCE = 1 << 23  # numbers that are rounded at once, of several experts


def load_time(kind: QuantizationType, device: torch.device) -> Callable[[str, Any], nn.Module]:
    """What replaces a linear (path within the model, loaded linear) as soon as it is loaded; all lose precision.

    Heads are left alone by formats of floating point: they decide between neighbouring tokens. On CPUs FP8 and FP4
    are the slow reference, for looking at accuracy; int8 and int4 are PyTorch's kernels.
    """
    quantize = _quantizer(kind, device)
    floats = not kind.weights.startswith("int")

    def transform(path: str, linear: Any) -> nn.Module:  # a layers.linear.Linear, which lies above this room
        if path.endswith((".router", ".shared_gate")):  # they decide between experts
            assert isinstance(linear, nn.Module)
            return linear
        if (floats and path == "head") or (kind.layers == "mlp" and ".mlp." not in path):
            assert isinstance(linear, nn.Module)
            return linear
        return quantize(linear.weight, linear.bias, linear.parts, getattr(linear, "num_experts", 0))

    return transform
