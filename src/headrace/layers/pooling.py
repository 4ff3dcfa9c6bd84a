"""From token vectors to one vector a sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.layers.packed import AttentionBatch

__all__ = ["pool", "segment_max"]


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
        return hidden[starts[:-1].long()].float()
    if mode == "last":
        return hidden[starts[1:].long() - 1].float()
    hidden = hidden.float()
    lengths = starts.diff().long()
    if mode == "max":
        return segment_max(hidden, lengths)
    if mode == "weighted_mean":
        ends = lengths.cumsum(0) - lengths
        place = torch.arange(1, hidden.shape[0] + 1, device=hidden.device)
        place = place - ends.repeat_interleave(lengths, output_size=hidden.shape[0])
        total = (lengths * (lengths + 1)).float()[:, None] / 2
        return _segments(hidden * place.float()[:, None], lengths, "sum") / total
    if mode == "mean":
        return _segments(hidden, lengths, "mean")
    assert mode == "mean_sqrt_len", mode
    return _segments(hidden, lengths, "sum") / lengths.float().sqrt()[:, None]


def segment_max(values: Tensor, lengths: Tensor) -> Tensor:
    """Maximum over each run of rows: values [T, D], lengths int64 [S] -> [S, D]."""
    return _segments(values, lengths, "max")


def _segments(values: Tensor, lengths: Tensor, reduce: str) -> Tensor:
    return torch.segment_reduce(values, reduce, lengths=lengths, axis=0, unsafe=True)
