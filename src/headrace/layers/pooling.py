"""From token vectors to one vector a sequence."""

from __future__ import annotations

from torch import Tensor

from headrace.kernels.pooling import segment_pool
from headrace.layers.packed import AttentionBatch

__all__ = ["pool"]


def pool(hidden: Tensor, batch: AttentionBatch, mode: str) -> Tensor:
    """Pool each sequence of a packed batch.

    A sequence's result does not depend on the others of its batch.

    Args:
        hidden: [T, D].
        mode: ``cls`` (first token), ``last``, ``mean``, ``max``, ``mean_sqrt_len`` (sum over the root of the
            length) or ``weighted_mean`` (weights 1, 2, 3, ...; Muennighoff 2022).
    Returns:
        float32 [S, D].
    """
    starts = batch.query_starts
    if mode == "cls":
        # Empty sequences (padding of a batch) begin behind the last row.
        return hidden[starts[:-1].clamp(max=hidden.shape[0] - 1)].float()
    if mode == "last":
        return hidden[starts[1:] - 1].float()
    if mode == "mean_sqrt_len":
        return segment_pool(hidden, starts, "sum") / starts.diff().float().sqrt()[:, None]
    assert mode in ("mean", "max", "weighted_mean"), mode
    return segment_pool(hidden, starts, mode)
