"""Integer weights with a scale, and maybe a zero point, for every group of columns: AWQ, GPTQ and their kin.

`int4.py` and `int8.py` hold the layouts of PyTorch's CPU kernels; this is the plain one, exact, for any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.errors import UnsupportedCheckpoint
from headrace.kernels.quantized_linear.formats import pack_nibbles, unpack_nibbles

__all__ = ["GroupIntWeight", "quantize_group_int"]


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

    def rows(self, start: int, stop: int) -> GroupIntWeight:
        """Some rows, views."""
        part = slice(start, stop)
        return GroupIntWeight(self.codes[part], self.scale[part], self.zero[part], self.bits, self.order)

    def reordered(self, order: Tensor) -> GroupIntWeight:
        """Rows ``order`` int64 [rows], exact."""
        return GroupIntWeight(self.codes[order], self.scale[order], self.zero[order], self.bits, self.order)

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


def quantize_group_int(
    weight: Tensor, bits: int, group: int, importance: Tensor | None = None
) -> GroupIntWeight:
    """Round 16- or 32-bit weights [rows, columns] to nearest, losing precision; symmetric, a scale a group.

    Four bits: the value of largest magnitude meets -8, and the width is shrunk to the best of a few, in squared
    error (weighed by ``importance`` [columns], see quantize_nvfp4). Eight bits: it meets 127.

    Raises UnsupportedCheckpoint when ``group`` does not divide the columns.
    """
    rows, columns = weight.shape
    if columns % group or (bits == 4 and group % 2):
        raise UnsupportedCheckpoint(
            f"int{bits} groups of {group} do not divide a weight of {columns} columns; keep this layer in 16 bits",
            param="quantization",
        )
    grouped = weight.float().view(rows, -1, group)
    if bits == 8:
        scale = (grouped.abs().amax(-1) / 127).clamp(min=1e-30)
        codes = (grouped / scale[..., None]).round_().clamp_(-127, 127)
    else:
        codes, scale = _four_bits(grouped, importance)
    low = 2 ** (bits - 1)
    plain = (codes + low).to(torch.uint8).flatten(1)
    packed = pack_nibbles(plain) if bits == 4 else plain
    return GroupIntWeight(packed, scale, torch.full_like(scale, low), bits)


def _four_bits(grouped: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes from -8 to 7 and their scales."""
    index = grouped.abs().argmax(-1, keepdim=True)
    peak = grouped.gather(-1, index).squeeze(-1)
    peak = torch.where(peak == 0, -1e-30, peak)
    best = torch.full_like(peak, torch.inf)
    codes, scale = torch.zeros_like(grouped), peak
    weights = 1.0 if importance is None else importance.float().view(1, -1, grouped.shape[-1])
    for ratio in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75):
        trial = peak * (ratio / -8)
        rounded = (grouped / trial[..., None]).round_().clamp_(-8, 7)
        error = ((rounded * trial[..., None] - grouped).square_() * weights).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        codes = torch.where(better[..., None], rounded, codes)
        scale = torch.where(better, trial, scale)
    return codes, scale
