"""Runs of equal lengths as one call; long sequences by pieces of queries, so that no [H, L, L] is built."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.kernels.biased_attention.reference import rows_of_bias

if TYPE_CHECKING:
    from headrace.layers.packed import AttentionBatch

__all__ = ["biased_attention"]

_WHOLE = 512  # longest sequence whose bias is built at once, and kept for the other layers
_PIECE = 256  # queries of one piece of a longer one


def biased_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, batch: AttentionBatch, *, scale: float
) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype)
    lens = batch.host_query_lens
    if lens is None:
        lens = batch.query_starts.diff().tolist()
    if batch.plan is None:
        batch.plan = {}
    row = 0
    for length, run in itertools.groupby(lens):
        count = len(list(run))
        if length == 0:  # padding of a batch
            continue
        rows = slice(row, row + count * length)
        shape = (count, length, *q.shape[1:])
        queries, keys, values = (x[rows].unflatten(0, shape[:2]).transpose(1, 2) for x in (q, k, v))
        target = out[rows].view(shape)
        for first in range(0, length, length if length <= _WHOLE else _PIECE):
            last = length if length <= _WHOLE else min(first + _PIECE, length)
            mask = _mask(batch.plan, bias, first, last, length, q.dtype)
            part = F.scaled_dot_product_attention(
                queries[:, :, first:last], keys, values, attn_mask=mask, scale=scale
            )
            target[:, first:last] = part.transpose(1, 2)
        row = rows.stop
    return out


def _mask(
    plan: dict[object, object], bias: Tensor, first: int, last: int, length: int, dtype: torch.dtype
) -> Tensor:
    """Bias of these queries, [H, last - first, length]; kept for the next layer unless it is large."""
    key = ("bias", bias.data_ptr(), length, dtype)
    mask = plan.get(key) if length <= _WHOLE else None
    if not isinstance(mask, Tensor):
        mask = rows_of_bias(bias, first, last, length).to(dtype)
        if length <= _WHOLE:
            plan[key] = mask
    return mask
