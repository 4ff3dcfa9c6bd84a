"""Which rows each expert gets: pairs of a token and one of its experts, sorted by expert."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["ExpertPlan"]


@dataclass(frozen=True)
class ExpertPlan:
    """Pair ``p`` is token ``p // k`` and its expert number ``p % k``.

    Attributes:
        chosen: int32 [T, k].
        num_experts: E.
        block: rows of a block on a GPU, of one expert each; 0: none are made.
        pairs: int32 [blocks * block], the pair of each row; undefined where there is none.
        contents: int32 [blocks], of each block its expert, and 65,536 times its rows; E where it has none.
    """

    chosen: Tensor
    num_experts: int
    block: int = 0
    pairs: Tensor | None = None
    contents: Tensor | None = None

    @property
    def num_pairs(self) -> int:
        return self.chosen.numel()
