"""Weights as int8 with one bfloat16 scale a row, for PyTorch's CPU kernel ``torch._weight_int8pack_mm``."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.errors import UnsupportedCheckpoint
from headrace.quantization.linear import PackedLinear

__all__ = ["Int8Linear", "quantize_int8"]

# The kernel reads whole vectors and checks nothing: other widths give wrong numbers or end the process.
_COLUMN_MULTIPLE = 32


class Int8Linear(PackedLinear):
    """A linear over int8 [out, in] times bfloat16 [out].

    Args:
        values, scale: as quantize_int8 returns them.
    """

    def __init__(
        self,
        values: Tensor,
        scale: Tensor,
        *,
        bias: Tensor | None = None,
        parts: tuple[int, ...] | None = None,
    ) -> None:
        assert values.shape[1] % _COLUMN_MULTIPLE == 0
        super().__init__(values.shape[1], values.shape[0], bias=bias, parts=parts)
        self.values, self.scale = values.contiguous(), scale

    def product(self, rows: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten._weight_int8pack_mm(rows, self.values, self.scale)
        return out

    def dequantize(self) -> Tensor:
        return self.values.float() * self.scale.float().unsqueeze(1)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round 16- or 32-bit weights [rows, columns] to nearest, losing precision; symmetric, one scale a row.

    Returns int8 [rows, columns] and bfloat16 [rows]. The scale is rounded before the values are.

    Raises UnsupportedCheckpoint when the columns are no multiple of 32.
    """
    if weight.shape[1] % _COLUMN_MULTIPLE:
        raise UnsupportedCheckpoint(
            f"int8 needs a multiple of {_COLUMN_MULTIPLE} columns; this weight is {list(weight.shape)}. "
            "Keep this layer in 16 bits",
            param="quantization",
        )
    full = weight.float()
    # One step of bfloat16 up, so that the largest value still fits after the scale was rounded.
    scale = (full.abs().amax(dim=1).clamp_(min=1e-30) * ((1 + 2**-8) / 127)).bfloat16()
    values = (full / scale.float().unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8)
    return values, scale
