"""One sequence at a time, in float32, straight from the definition."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from headrace.layers.packed import AttentionBatch

__all__ = ["biased_attention", "rows_of_bias"]


def rows_of_bias(bias: Tensor, first: int, last: int, num_keys: int) -> Tensor:
    """[H, last - first, num_keys] of bias [H, 2 R + 1] for queries ``first`` to ``last`` - 1."""
    reach = bias.shape[1] // 2
    queries = torch.arange(first, last, device=bias.device)[:, None]
    distance = torch.arange(num_keys, device=bias.device)[None, :] - queries
    return bias[:, distance.clamp_(-reach, reach) + reach]


def biased_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, batch: AttentionBatch, *, scale: float
) -> Tensor:
    starts = batch.query_starts.tolist()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for first, last in itertools.pairwise(starts):
        rows = slice(first, last)
        scores = torch.einsum("qhd,khd->hqk", q[rows].float(), k[rows].float()) * scale
        scores += rows_of_bias(bias, 0, last - first, last - first)
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[rows].float()).to(q.dtype)
    return out
