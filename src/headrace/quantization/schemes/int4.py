"""Weights as 4-bit codes with a bfloat16 scale and zero a group, for PyTorch's CPU kernel.

The kernel (``torch.ops.aten._weight_int4pack_mm_for_cpu``) multiplies bfloat16 activations with
``(code - 8) * scale + zero``, formed in float32, sums in float32 in the order of the columns and rounds once.
So a row's result depends neither on its neighbours nor on the number of threads.

Values of up to 8 bits take two planes, ``16 * high + low`` with both in [-8, 7]: a group of the kernel then holds
the low halves of its columns and after them the high ones, and meets ``[x, 16 x]``, which is exact in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from headrace.errors import UnsupportedCheckpoint
from headrace.quantization.linear import PackedLinear

__all__ = ["GROUPS", "ROW_BLOCK", "Int4Linear", "Int4Weight", "fast_on_this_cpu", "quantize_int4"]

GROUPS = (32, 64, 128, 256)
"""Columns that may share one scale in the kernel."""

ROW_BLOCK = 64
"""The kernel's layout is one run of memory for each block of so many rows (or a divisor of it)."""

_ROW_MULTIPLE = 16
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
_TWO_PLANES_LOW, _TWO_PLANES_HIGH = -136, 119
_ZERO_SHARE = 17  # x + 16 x: how often a group of two planes counts its zero


def fast_on_this_cpu() -> bool:
    """Whether the kernel is vectorized here; elsewhere dense weights are faster."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX512", "AVX2")


class Int4Weight:
    """Codes, scales and zeros in the kernel's layout, which depends on the CPU and is never stored.

    Build with ``one_plane`` or ``two_planes``.

    Attributes:
        codes: uint8 [rows padded to 16, columns / 2], times two for two planes.
        scales: bfloat16 [groups, padded rows, 2], scale and zero.
        group: columns that share a scale, as the kernel counts them.
        halves: 0 for one plane, else how many low halves lie before their high halves.
    """

    def __init__(self, codes: Tensor, scale: Tensor, zero: Tensor, *, halves: int) -> None:
        rows, groups = scale.shape
        columns = codes.shape[1]
        padding = -rows % _ROW_MULTIPLE
        if padding:
            codes = torch.cat((codes, codes.new_full((padding, columns), 8)))
            scale, zero = (torch.cat((t, t.new_zeros(padding, groups))) for t in (scale, zero))
        self.rows = rows
        self.group = columns // groups
        self.halves = halves
        assert self.group in GROUPS, self.group
        assert self.group * groups == columns
        # The second argument is for GPUs only.
        self.codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
        self.scales = torch.stack((scale.t(), zero.t()), dim=-1).to(torch.bfloat16).contiguous()

    @staticmethod
    def one_plane(values: Tensor, scale: Tensor, offset: Tensor | None, *, low: int) -> Int4Weight:
        """From ``values * scale + offset`` with values in [low, low + 15].

        Args:
            values: int8 or uint8 [rows, groups, size], size in GROUPS.
            scale, offset: float32 [rows, groups].
        """
        codes = (values - low).flatten(1)
        zero = scale * (low + 8)
        return Int4Weight(codes, scale, zero if offset is None else zero + offset, halves=0)

    @staticmethod
    def two_planes(values: Tensor, scale: Tensor, offset: Tensor | None, *, center: int) -> Int4Weight:
        """From ``values * scale + offset`` with values - center in [-136, 119].

        Args:
            values: int8 or uint8 [rows, groups, size], size 16, 32, 64 or 128.
            scale, offset: float32 [rows, groups].
        """
        centered = values.to(torch.int16) - center
        high = (centered + 8) >> 4
        low = centered - (high << 4)
        codes = (torch.stack((low, high), dim=2) + 8).flatten(1)
        zero = scale * center
        if offset is not None:
            zero = zero + offset
        return Int4Weight(codes, scale, zero / _ZERO_SHARE, halves=values.shape[-1])

    @staticmethod
    def joined(pieces: Iterable[Int4Weight], rows: int) -> Int4Weight:
        """Pieces of so many ``rows`` in all, one after another. All but the last have a multiple of ROW_BLOCK rows.

        Their place is taken before the second is made, and each is let go once it is copied: pieces that live on
        between the temporaries of making them keep the C library from using that memory again (2 GB for a head of
        262,144 rows).
        """
        whole = object.__new__(Int4Weight)
        whole.rows, at, padded = rows, 0, rows + -rows % _ROW_MULTIPLE
        for piece in pieces:
            if piece.rows == rows:
                return piece
            if at == 0:
                whole.group, whole.halves = piece.group, piece.halves
                whole.codes = piece.codes.new_empty(padded, piece.codes.shape[1])
                whole.scales = piece.scales.new_empty(len(piece.scales), padded, 2)
            assert at % ROW_BLOCK == 0
            end = at + len(piece.codes)
            whole.codes[at:end], whole.scales[:, at:end] = piece.codes, piece.scales
            at = end
            del piece
        assert at == padded, (at, padded)
        return whole

    @property
    def nbytes(self) -> int:
        return int(self.codes.nbytes + self.scales.nbytes)


class Int4Linear(PackedLinear):
    """A linear over an Int4Weight."""

    def __init__(
        self,
        weight: Int4Weight,
        *,
        bias: Tensor | None = None,
        parts: tuple[int, ...] | None = None,
    ) -> None:
        planes = 2 if weight.halves else 1
        super().__init__(weight.codes.shape[1] * 2 // planes, weight.rows, bias=bias, parts=parts)
        self.codes, self.scales, self.group, self.halves = (
            weight.codes,
            weight.scales,
            weight.group,
            weight.halves,
        )
        self.powers = torch.tensor([[1.0], [16.0]], dtype=torch.bfloat16)

    def product(self, rows: Tensor) -> Tensor:
        if self.halves:
            rows = (rows.view(rows.shape[0], -1, 1, self.halves) * self.powers).flatten(1)
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.codes, self.group, self.scales)
        return out

    def dequantize(self) -> Tensor:
        columns = int(self.codes.shape[1]) * 2
        scale, zero = self.scales.float().unbind(-1)
        # Asked one column at a time, with scale 1 and zero 0, the kernel tells its codes back exactly.
        plain = torch.stack((torch.ones_like(scale), torch.zeros_like(zero)), -1).bfloat16()
        unit = torch.eye(columns, dtype=torch.bfloat16)
        codes = torch.ops.aten._weight_int4pack_mm_for_cpu(unit, self.codes, self.group, plain).float()
        weight: Tensor = codes.view(-1, self.group, codes.shape[1]) * scale.unsqueeze(1) + zero.unsqueeze(1)
        weight = weight.flatten(0, 1)
        if self.halves:
            planes = weight.view(-1, 2, self.halves, weight.shape[1])
            weight = (planes[:, 0] + 16 * planes[:, 1]).flatten(0, 1)
        return weight[:, : self.out_features].t().contiguous()

    @property
    def nbytes(self) -> int:
        return int(self.codes.nbytes + self.scales.nbytes)


def quantize_int4(weight: Tensor, group: int = 32) -> Int4Weight:
    """Round 16- or 32-bit weights [rows, columns] to nearest, losing precision.

    Each group's range is shrunk to the one of six widths with the least squared error.

    Raises UnsupportedCheckpoint when ``group`` does not divide the columns or is none of GROUPS.
    """
    rows, columns = weight.shape
    if group not in GROUPS or columns % group:
        usable = [size for size in GROUPS if columns % size == 0]
        raise UnsupportedCheckpoint(
            f"int4 groups of {group} do not divide a weight of {columns} columns; "
            + (f"use one of {usable}" if usable else "keep this layer in 16 bits or use int8"),
            param="group",
        )
    grouped = weight.float().view(rows, -1, group)
    low, high = grouped.aminmax(dim=-1)
    middle = ((low + high) / 2).bfloat16().float()
    best = torch.full_like(low, torch.inf)
    codes = torch.empty(grouped.shape, dtype=torch.int8)
    scale = torch.empty_like(low)
    for ratio in _SHRINK:
        trial = ((high - low) * (ratio / 15)).clamp_(min=1e-30).bfloat16().float()
        # The codes reach from -8 to 7, so the middle of the range is half a step above zero.
        zero = (middle + trial / 2).bfloat16().float()
        rounded = ((grouped - zero.unsqueeze(-1)) / trial.unsqueeze(-1)).round_().clamp_(-8, 7)
        error = (rounded * trial.unsqueeze(-1) + zero.unsqueeze(-1) - grouped).square_().sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        codes = torch.where(better.unsqueeze(-1), rounded.to(torch.int8), codes)
        scale = torch.where(better, trial, scale)
    zero = (middle + scale / 2).bfloat16().float()
    return Int4Weight.one_plane(codes, scale, zero, low=-8)
