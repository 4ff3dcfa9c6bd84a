"""How a file holds the matrices of all experts in one tensor, where it is not as layers/experts.py has them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Stacked"]


@dataclass(frozen=True)
class Stacked:
    """Order of a tensor of all experts; the decoder's is [experts, out, in], all gates before all ups.

    Attributes:
        transposed: weights are [experts, in, out].
        interleaved: rows of gates and ups alternate, in weights and biases.
    """

    transposed: bool = False
    interleaved: bool = False

    def shape(self, wanted: tuple[int, ...]) -> tuple[int, ...]:
        """Of the file's tensor that gives one of shape ``wanted``, [experts, out, in] or a bias's [experts, out]."""
        return (wanted[0], wanted[2], wanted[1]) if self.transposed and len(wanted) == 3 else wanted

    def arranged(self, tensor: Tensor) -> Tensor:
        """The file's tensor as the decoder has it."""
        if self.transposed and tensor.dim() == 3:
            tensor = tensor.transpose(1, 2)
        if self.interleaved:
            tensor = tensor.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
        return tensor
