"""Which packed linear a checkpoint's tensor or a user's wish leads to; the loader asks here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from headrace.checkpoints.base import PackedTensor, TensorInfo
from headrace.errors import ConfigError, nearest
from headrace.quantization.ggml import KEEPABLE
from headrace.quantization.linear import PackedLinear
from headrace.quantization.schemes.int4 import Int4Linear, fast_on_this_cpu, quantize_int4
from headrace.quantization.schemes.int8 import Int8Linear, quantize_int8

__all__ = ["LOAD_TIME", "PackedSource", "Quantizer", "can_keep", "keeps_packed", "quantizer"]

Quantizer = Callable[[Tensor, Tensor | None, tuple[int, ...]], PackedLinear]  # weight, bias, parts


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
    return (
        isinstance(weights, PackedSource)
        and device.type == "cpu"
        and dtype is torch.bfloat16
        and fast_on_this_cpu()
        and any(can_keep(weights.info(name)) for name in weights.names())
    )


def _int4(group: int) -> Quantizer:
    def quantize(weight: Tensor, bias: Tensor | None, parts: tuple[int, ...]) -> PackedLinear:
        return Int4Linear(quantize_int4(weight, group), bias=bias, parts=parts)

    return quantize


def _int8(weight: Tensor, bias: Tensor | None, parts: tuple[int, ...]) -> PackedLinear:
    return Int8Linear(*quantize_int8(weight), bias=bias, parts=parts)


LOAD_TIME: dict[str, Quantizer] = {
    "int8": _int8,
    "int4": _int4(32),
    "int4-g64": _int4(64),
    "int4-g128": _int4(128),
}
"""Weight-only schemes made from 16- or 32-bit weights while they load. All of them lose precision."""


def quantizer(scheme: str, device: torch.device) -> Quantizer:
    """The load-time scheme of this name. Raises ConfigError for an unknown one, or one that is not for the device."""
    found = LOAD_TIME.get(scheme)
    if found is None:
        raise ConfigError(
            f"quantization {scheme!r} is unknown{nearest(scheme, LOAD_TIME)}; "
            f"schemes made at load time are {', '.join(LOAD_TIME)}",
            param="quantization",
        )
    if device.type != "cpu":
        raise ConfigError(
            f"quantization {scheme!r} runs on the CPU; the device is {device.type}. Leave it out, or use device cpu",
            param="quantization",
        )
    return found
