"""Segment reductions as PyTorch has them, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["segment_pool"]


def segment_pool(values: Tensor, starts: Tensor, mode: str) -> Tensor:
    values = values.float()
    lengths = starts.diff().long()
    if mode != "weighted_mean":
        return _reduce(values, lengths, mode)
    rows = torch.arange(values.shape[0], device=values.device)
    place = rows - starts[:-1].long().repeat_interleave(lengths, output_size=values.shape[0]) + 1
    total = (lengths * (lengths + 1)).float()[:, None] / 2
    return _reduce(values * place.float()[:, None], lengths, "sum") / total


def _reduce(values: Tensor, lengths: Tensor, mode: str) -> Tensor:
    return torch.segment_reduce(values, mode, lengths=lengths, axis=0, unsafe=True)
