"""FP8 (E4M3) weights with float32 scales for the whole matrix, for rows, or for blocks.

Blocks of 128 x 128 are DeepSeek-V3's (arXiv 2412.19437, section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headrace.kernels.quantized_linear.formats import FP8_MAX, to_fp8

__all__ = ["Fp8Weight", "Granularity", "quantize_fp8"]

Granularity = Literal["tensor", "channel", "block"]
_BLOCK = (128, 128)


@dataclass(frozen=True)
class Fp8Weight:
    """``codes * scale``, a scale for each block of ``block[0]`` rows and ``block[1]`` columns.

    Attributes:
        codes: float8_e4m3fn [rows, columns].
        scale: float32 [ceil(rows / block[0]), ceil(columns / block[1])].
        block: (rows, columns) that share a scale; (1, columns) is one a row.
    """

    codes: Tensor
    scale: Tensor
    block: tuple[int, int]

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        wanted = (math.ceil(rows / self.block[0]), math.ceil(columns / self.block[1]))
        assert tuple(self.scale.shape) == wanted, (self.scale.shape, wanted)
        assert self.codes.dtype is torch.float8_e4m3fn and self.scale.dtype is torch.float32

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        return int(self.codes.nbytes + self.scale.nbytes)

    def dequantize(self) -> Tensor:
        """float32 [rows, columns], each product rounded once."""
        columns = self.shape[1]
        scale = self.row_scales()
        if scale.shape[1] > 1:
            scale = scale.repeat_interleave(self.block[1], 1)[:, :columns]
        return self.codes.float() * scale

    def to(self, device: torch.device) -> Fp8Weight:
        return Fp8Weight(self.codes.to(device), self.scale.to(device), self.block)

    def row_scales(self) -> Tensor:
        """float32 [rows, column blocks]."""
        return self.scale.repeat_interleave(self.block[0], 0)[: self.codes.shape[0]]

    def rows(self, start: int, stop: int) -> Fp8Weight:
        """Some rows, exact."""
        part = slice(start, stop)
        return Fp8Weight(self.codes[part], self.row_scales()[part], (1, self.block[1]))

    def reordered(self, order: Tensor) -> Fp8Weight:
        """Rows ``order`` int64 [rows], exact."""
        codes = self.codes.view(torch.uint8)[order].view(self.codes.dtype)
        return Fp8Weight(codes, self.row_scales()[order], (1, self.block[1]))

    @staticmethod
    def joined(parts: Sequence[Fp8Weight]) -> Fp8Weight:
        """Rows one after another; exact, with finer scales where the parts' do not line up."""
        if len(parts) == 1:
            return parts[0]
        columns = {part.block[1] for part in parts}
        assert len(columns) == 1, f"blocks of different widths: {columns}"
        width, height = columns.pop(), parts[0].block[0]
        aligned = all(part.block[0] == height and part.shape[0] % height == 0 for part in parts)
        whole = all(part.block[0] >= part.shape[0] for part in parts)
        codes = torch.cat([part.codes.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
        if aligned and not whole:
            return Fp8Weight(codes, torch.cat([part.scale for part in parts]), (height, width))
        return Fp8Weight(codes, torch.cat([part.row_scales() for part in parts]), (1, width))


def quantize_fp8(
    weight: Tensor, granularity: Granularity = "channel", block: tuple[int, int] = _BLOCK
) -> Fp8Weight:
    """Round 16- or 32-bit weights [rows, columns] to nearest, losing precision; the largest value meets 448.

    Rounding twice is stable: quantizing the dequantized weight gives the same codes and scales.
    """
    full = weight.float()
    rows, columns = full.shape
    if granularity == "tensor":
        block = (rows, columns)
    elif granularity == "channel":
        block = (1, columns)
    height, width = min(block[0], rows), min(block[1], columns)
    high, wide = math.ceil(rows / height), math.ceil(columns / width)
    padded = torch.nn.functional.pad(full, (0, wide * width - columns, 0, high * height - rows))
    tiles = padded.view(high, height, wide, width)
    peak = tiles.abs().amax(dim=(1, 3))
    scale = torch.where(peak > 0, (peak / FP8_MAX).clamp(min=2.0**-126), 1.0)
    codes = to_fp8(tiles / scale[:, None, :, None]).view(torch.uint8)
    codes = codes.view(high * height, wide * width)[:rows, :columns].contiguous().view(torch.float8_e4m3fn)
    return Fp8Weight(codes, scale, (height, width))
