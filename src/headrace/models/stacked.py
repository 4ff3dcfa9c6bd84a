"""How a file holds the matrices of all experts in one tensor, where it is not as layers/experts.py has them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Stacked"]


@dataclass(frozen=True)
class Stacked:
    """Order of a tensor of all experts; the decoder's is [experts, out, in], all gates before all ups.

    Attributes:
        transposed: weights of 16 or 32 bits are [experts, in, out] (packed ones never are).
        interleaved: rows of gates and ups alternate, in weights and biases.
    """

    transposed: bool = False
    interleaved: bool = False

    def shape(self, wanted: tuple[int, ...], *, packed: bool) -> tuple[int, ...]:
        """Of the file's tensor that gives one of shape ``wanted``, [experts, out, in] or a bias's [experts, out]."""
        if self.transposed and not packed and len(wanted) == 3:
            return wanted[0], wanted[2], wanted[1]
        return wanted

    def arranged(self, tensor: Tensor, *, packed: bool) -> Tensor:
        """The file's tensor as the decoder has it."""
        if self.transposed and not packed and tensor.dim() == 3:
            tensor = tensor.transpose(1, 2)
        if self.interleaved:
            tensor = tensor.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
        return tensor

    def rows(self, num_experts: int, num_rows: int) -> Tensor | None:
        """Where the decoder's rows lie among the file's, int64 [experts * rows]; None: in the same order."""
        if not self.interleaved:
            return None
        places = torch.arange(num_experts * num_rows).view(num_experts, num_rows)
        return self.arranged(places, packed=True).flatten()
