"""Integer weights with a scale, and maybe a zero point, for every group of columns: AWQ, GPTQ and their kin.

`int4.py` and `int8.py` hold the layouts of PyTorch's CPU kernels; this is the plain one, exact, for any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.kernels.quantized_linear.formats import unpack_nibbles

__all__ = ["GroupIntWeight"]


@dataclass(frozen=True)
class GroupIntWeight:
    """``(code - zero) * scale``.

    Attributes:
        codes: uint8 [rows, columns * bits / 8]; of 4-bit codes the first of two columns in the low half.
        scale, zero: float32 [rows, groups]; zeros are whole numbers, the code that stands for 0.
        bits: 4 or 8.
        order: int64 [columns], the group of each column where they do not follow one another (GPTQ's
            ``desc_act``), else None.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    order: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.bits in (4, 8)
        assert self.codes.dtype is torch.uint8
        assert self.scale.shape == self.zero.shape
        assert self.scale.shape[0] == self.codes.shape[0]
        assert self.order is not None or self.shape[1] % self.scale.shape[1] == 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1] * 8 // self.bits

    @property
    def group(self) -> int:
        """Columns that share a scale (in order)."""
        return self.shape[1] // self.scale.shape[1]

    @property
    def nbytes(self) -> int:
        return int(self.codes.nbytes + self.scale.nbytes + self.zero.nbytes)

    def values(self) -> Tensor:
        """The codes, uint8 [rows, columns]."""
        return unpack_nibbles(self.codes) if self.bits == 4 else self.codes

    def dequantize(self) -> Tensor:
        """float32 [rows, columns], each product rounded once."""
        order = self.order
        if order is None:
            order = torch.arange(self.shape[1], device=self.codes.device) // self.group
        return (self.values().float() - self.zero[:, order]) * self.scale[:, order]

    def to(self, device: torch.device) -> GroupIntWeight:
        order = None if self.order is None else self.order.to(device)
        return GroupIntWeight(
            self.codes.to(device), self.scale.to(device), self.zero.to(device), self.bits, order
        )

    def scaled_rows(self, factor: Tensor) -> GroupIntWeight:
        """The same weight with every row times ``factor`` [rows]."""
        return GroupIntWeight(self.codes, self.scale * factor[:, None], self.zero, self.bits, self.order)

    @staticmethod
    def joined(parts: Sequence[GroupIntWeight]) -> GroupIntWeight:
        """Rows one after another, exact. All parts have the same groups (projections over one input have)."""
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        codes, scale, zero = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scale", "zero")
        )
        return GroupIntWeight(codes, scale, zero, first.bits, first.order)

    def joins(self, other: GroupIntWeight) -> bool:
        """Whether ``joined`` may take both."""
        if self.bits != other.bits or self.scale.shape[1] != other.scale.shape[1]:
            return False
        if self.order is None or other.order is None:
            return self.order is other.order
        return torch.equal(self.order, other.order)
