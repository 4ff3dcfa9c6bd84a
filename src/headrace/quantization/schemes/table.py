"""Weights of 4 bits that are places in a table of 16 numbers (NF4, bitsandbytes' FP4): read, and held in 16 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TableWeight"]


@dataclass(frozen=True)
class TableWeight:
    """``table[code] * scale`` (QLoRA, Dettmers et al. 2023), numbers of all rows one after another.

    Attributes:
        codes: uint8 [ceil(rows * columns / 2)], the first of two numbers in the high half.
        table: float32 [16].
        scale: float32 [ceil(rows * columns / block)].
        block: numbers that share a scale.
        shape: (rows, columns).
    """

    codes: Tensor
    table: Tensor
    scale: Tensor
    block: int
    shape: tuple[int, int]

    def dequantize(self) -> Tensor:
        """float32 [rows, columns], each product rounded once."""
        rows, columns = self.shape
        places = torch.stack((self.codes >> 4, self.codes & 15), dim=1).flatten()[: rows * columns]
        scale = self.scale.repeat_interleave(self.block)[: rows * columns]
        return (self.table[places.long()] * scale).view(self.shape)
