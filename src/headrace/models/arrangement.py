"""How a file's tensors lie, where it is not as the decoder has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Arrangement", "NeighbourPairs", "Stacked"]


class Arrangement(Protocol):
    """From the file's order to the decoder's."""

    def shape(self, wanted: tuple[int, ...]) -> tuple[int, ...]:
        """Of the file's tensor that gives one of shape ``wanted``."""
        ...

    def arranged(self, tensor: Tensor) -> Tensor:
        """The file's tensor as the decoder has it."""
        ...


@dataclass(frozen=True)
class Stacked:
    """The matrices of all experts in one tensor; the decoder's is [experts, out, in], all gates before all ups.

    Attributes:
        transposed: weights are [experts, in, out].
        interleaved: rows of gates and ups alternate, in weights and biases.
    """

    transposed: bool = False
    interleaved: bool = False

    def shape(self, wanted: tuple[int, ...]) -> tuple[int, ...]:
        return (wanted[0], wanted[2], wanted[1]) if self.transposed and len(wanted) == 3 else wanted

    def arranged(self, tensor: Tensor) -> Tensor:
        if self.transposed and tensor.dim() == 3:
            tensor = tensor.transpose(1, 2)
        if self.interleaved:
            tensor = tensor.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
        return tensor


@dataclass(frozen=True)
class NeighbourPairs:
    """Queries and keys whose rotary embedding turns dimensions 2i and 2i + 1; the decoder turns i and i + R / 2.

    Their products are the same in any order of the dimensions that both share.

    Attributes:
        head_dim: rows of a head.
        rotated: of them, from the first (R).
    """

    head_dim: int
    rotated: int

    def shape(self, wanted: tuple[int, ...]) -> tuple[int, ...]:
        return wanted

    def arranged(self, tensor: Tensor) -> Tensor:
        heads = tensor.unflatten(0, (-1, self.head_dim))
        turned = heads[:, : self.rotated].unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
        import torch  # only here: planning reads the families without it

        return torch.cat((turned, heads[:, self.rotated :]), dim=1).flatten(0, 1)
