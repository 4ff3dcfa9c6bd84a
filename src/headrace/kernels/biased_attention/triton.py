"""The packed kernel with a bias."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from headrace.kernels.attention.triton_packed import packed_attention

if TYPE_CHECKING:
    from headrace.layers.packed import AttentionBatch

__all__ = ["biased_attention"]


def biased_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, batch: AttentionBatch, *, scale: float
) -> Tensor:
    return packed_attention(q, k, v, batch, scale=scale, bias=bias)
