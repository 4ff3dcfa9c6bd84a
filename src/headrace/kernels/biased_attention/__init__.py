"""Bidirectional attention with a bias by distance.

ALiBi is Press et al. 2022, relative buckets are Raffel et al. 2020.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from headrace.kernels.dispatch import kernel

if TYPE_CHECKING:
    from headrace.layers.packed import AttentionBatch

__all__ = ["biased_attention"]


def biased_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, batch: AttentionBatch, *, scale: float
) -> Tensor:
    """softmax(scale * q . k + bias) . v within each sequence of a cache-less packed batch.

    Args:
        q, k, v: [T, H, D]; only the last dimension is sure to be contiguous.
        bias: float32 [H, 2 R + 1]: what is added for keys at distance key - query = -R ... R; farther ones
            get the value at the border.
    Returns:
        [T, H, D], contiguous.
    """
    run = kernel("biased_attention", "biased_attention", q.device.type)
    return run(q, k, v, bias, batch, scale=scale)  # type: ignore[no-any-return]
