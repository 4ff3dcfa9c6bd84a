"""What a reader of quantized checkpoints provides, and the checkpoint that it makes of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace.checkpoints.base import Checkpoint, TensorInfo
from headrace.checkpoints.quantization_rules import cache_problem, refuse, wanted_cache
from headrace.checkpoints.quantization_settings import QuantizationSettings, without_quantization
from headrace.errors import UnsupportedCheckpoint
from headrace.quantization.scaled import Activations, QuantizedWeight
from headrace.quantization.schemes.table import TableWeight

__all__ = ["Container", "Module", "QuantizedCheckpoint", "splits_unevenly"]

_PLAIN = frozenset({"F64", "F32", "F16", "BF16", "BOOL", "I64"})  # the last: position_ids
_NAN = {torch.float8_e4m3fn: 0x7F, torch.uint8: 0xFF}  # beside 0xFF, of both
_CACHE_SCALES = (".k_scale", ".v_scale", ".kv_scale")
_KV_SCALES = (*_CACHE_SCALES, ".output_scale", ".q_scale", ".k_zero_point", ".v_zero_point")


@dataclass(frozen=True)
class Module:
    """One quantized matrix.

    Attributes:
        shape: logical [..., rows, columns]; ``read`` gives it with all rows one after another.
        tensors: the raw tensors that it takes.
        read: them as one weight.
        activations: how its input is rounded.
        bits: of its numbers, where the bytes on disk do not say so; else 0.
        fitted: of 4-bit integers, which others may have fitted to data, the columns that share a scale; else 0.
    """

    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    read: Callable[[], QuantizedWeight | TableWeight]
    activations: Callable[[], Activations] = Activations
    bits: int = 0
    fitted: Callable[[], int] = int


@dataclass
class Container(ABC):
    """A convention of names and packings.

    Args:
        found: the block that declares it, checked.
        raw: the checkpoint as it lies there.
    """

    found: QuantizationSettings
    raw: Checkpoint

    @property
    def settings(self) -> Mapping[str, Any]:
        """The block, flat."""
        return self.found.values

    @property
    def where(self) -> str:
        """File and key of the block, for messages."""
        return self.found.where

    @property
    @abstractmethod
    def label(self) -> str:
        """For people: ``fp8 (compressed-tensors)``."""

    @abstractmethod
    def modules(self) -> dict[str, Module]:
        """Logical tensor name (``....weight``) -> what it is made of. Raises UnsupportedCheckpoint."""

    @property
    def kv_cache(self) -> str:
        """``fp8`` when the checkpoint asks for an FP8 cache, else ``auto``. Raises for one that is not had."""
        if problem := cache_problem(self.found):
            raise UnsupportedCheckpoint(problem, param="kv_cache_dtype")
        return wanted_cache(self.found) or "auto"

    # --- for readers -----------------------------------------------------------------------------

    def need(self, name: str, dtypes: Iterable[str], shape: tuple[int, ...] | None = None) -> TensorInfo:
        """Facts of a raw tensor that must be there, of one of these types and this shape."""
        if name not in self.names:
            raise UnsupportedCheckpoint(
                f"{self.raw.path} holds no tensor {name!r}, which {self.label} calls for", param=name
            )
        info = self.raw.info(name)
        if info.dtype not in dtypes or (shape is not None and info.shape != shape):
            wanted = f"{'/'.join(dtypes)}" + (f" {list(shape)}" if shape is not None else "")
            raise UnsupportedCheckpoint(
                f"tensor {name!r} is {info.dtype} {list(info.shape)}; {self.label} calls for {wanted}",
                param=name,
            )
        return info

    def matrix(self, name: str, dtypes: Iterable[str]) -> tuple[int, int]:
        """The shape of a raw tensor that must be there, of one of these types and two dimensions."""
        shape = self.need(name, dtypes).shape
        if len(shape) != 2:
            raise UnsupportedCheckpoint(
                f"tensor {name!r} is {list(shape)}; {self.label} calls for two dimensions", param=name
            )
        return shape[0], shape[1]

    def single(self, name: str, dtypes: Iterable[str]) -> None:
        """Refuse a raw tensor that is not there, not of one of these types, or not one number."""
        if math.prod(self.need(name, dtypes).shape) != 1:
            self.need(name, dtypes, ())

    def groups(self, name: str, columns: int, groups: int) -> Tensor | None:
        """Which of ``groups`` each column belongs to, int64 [columns], of a raw tensor of that shape.

        None where equally many columns follow one another. Raises UnsupportedCheckpoint for groups that are not there.
        """
        order = self.raw.load(name).long()
        if int(order.min()) < 0 or int(order.max()) >= groups:
            raise UnsupportedCheckpoint(
                f"tensor {name!r} names groups {int(order.min())} to {int(order.max())}; {self.label} calls for "
                f"0 to {groups - 1}",
                param=name,
            )
        plain = torch.arange(columns) // (columns // groups) if columns % groups == 0 else None
        return None if plain is not None and torch.equal(order, plain) else order

    @cached_property
    def names(self) -> frozenset[str]:
        """All raw tensors."""
        return frozenset(self.raw.names())

    def float(self, name: str) -> Tensor:
        """A raw tensor as float32, finite."""
        value = self.raw.load(name).float()
        if not bool(torch.isfinite(value).all()):
            raise UnsupportedCheckpoint(f"tensor {name!r} holds NaN or infinity", param=name)
        return value

    def block_scales(self, name: str) -> Tensor:
        """Scales of blocks as they lie there, float8_e4m3fn or exponents in uint8, none of them NaN."""
        scales = self.raw.load(name)
        if bool(((scales.view(torch.uint8) == 255) | (scales.view(torch.uint8) == _NAN[scales.dtype])).any()):
            raise UnsupportedCheckpoint(f"tensor {name!r} holds NaN", param=name)
        return scales

    def refuse(self, key: str, value: object, expected: str) -> UnsupportedCheckpoint:
        """The error for a setting; raise it."""
        return refuse(f"{self.where}.{key}", value, expected)


def splits_unevenly(columns: int, groups: int, size: object) -> bool:
    """Whether groups of the declared ``size``, as many as there are scales for, leave a last one of fewer columns.

    960 columns in groups of 128 have 8 scales, which must not be taken for those of 8 groups of 120.
    """
    if groups < 1 or columns % groups:
        return True
    if groups == 1 or not isinstance(size, int) or size <= 0:
        return False
    return columns % size > 0 and columns // size + 1 == groups


class QuantizedCheckpoint:
    """Implements Checkpoint: dense weights to those who load, packed ones to those who ask.

    ``names`` are those of the unquantized model. ``config`` has no quantization_config any more.

    Args:
        raw: the checkpoint as it lies there.
        container: its reader.

    Raises UnsupportedCheckpoint when a tensor is missing, has another shape or type, or belongs to nothing.
    """

    def __init__(self, raw: Checkpoint, container: Container) -> None:
        self.raw, self.container = raw, container
        self.path: Path = raw.path
        self.config = without_quantization(raw.config)
        self.generation_config: dict[str, Any] = raw.generation_config
        self.modules = container.modules()
        if not self.modules and not wanted_cache(container.found):
            raise UnsupportedCheckpoint(
                f"{container.where} declares {self.label}, but no tensor of {self.path} is quantized so; "
                "remove the block if the weights are in 16 bits",
                param="quantization_config",
            )
        taken = {name for module in self.modules.values() for name in module.tensors}
        self._rest = [n for n in raw.names() if n not in taken and not n.endswith(_KV_SCALES)]
        for name in self._rest:
            if raw.info(name).dtype not in _PLAIN:
                raise UnsupportedCheckpoint(
                    f"tensor {name!r} is {raw.info(name).dtype} and belongs to no matrix that {self.label} "
                    "describes",
                    param=name,
                )

    @property
    def fingerprint(self) -> str:
        return self.raw.fingerprint

    @property
    def label(self) -> str:
        """For people: format and container."""
        return self.container.label

    @cached_property
    def largest_cache_scale(self) -> float:
        """The largest scale that was calibrated for an FP8 cache; 0 without any.

        Above 1 keys or values beyond 448 were met, which an FP8 cache without scales cannot hold.
        """
        names = [name for name in self.raw.names() if name.endswith(_CACHE_SCALES)]
        return max((float(self.container.float(name).max()) for name in names), default=0.0)

    def names(self) -> list[str]:
        return [*self._rest, *self.modules]

    def info(self, name: str) -> TensorInfo:
        module = self.modules.get(name)
        if module is None:
            return self.raw.info(name)
        return TensorInfo(
            module.shape, self.container.label, sum(self.raw.info(raw).nbytes for raw in module.tensors)
        )

    def load(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        if name in self.modules:
            tensor = self.quantized(name).dequantize().view(self.modules[name].shape)
        else:
            tensor = self.raw.load(name)
        return tensor if dtype is None else tensor.to(dtype)

    def quantized(self, name: str) -> QuantizedWeight | TableWeight:
        """A matrix as it is packed. ``name`` is one of ``modules``."""
        return self.modules[name].read()
