"""Attention one sequence at a time, in float32, straight from the definition."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headrace.kernels.attention.cache import readable, store, take
from headrace.kernels.dispatch import kernel
from headrace.kernels.rounding import Bound, Rounded, within

if TYPE_CHECKING:
    from headrace.layers.packed import AttentionBatch

__all__ = ["attention", "rounded_attention", "visible"]


def visible(
    query_len: int, key_len: int, *, causal: bool, window: int | None, device: torch.device
) -> Tensor:
    """Which keys each of the last ``query_len`` positions may see: bool [query_len, key_len]."""
    queries = torch.arange(key_len - query_len, key_len, device=device)[:, None]
    keys = torch.arange(key_len, device=device)[None, :]
    allowed = keys <= queries if causal else torch.ones_like(keys <= queries)
    if window is not None:
        allowed = allowed & ((queries - keys).abs() < window)
    return allowed


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: AttentionBatch,
    layer: int,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    starts, lens = batch.query_starts.tolist(), batch.seq_lens.tolist()
    cache = batch.caches[layer] if batch.caches else None
    if cache is not None:
        assert batch.slots is not None
        assert batch.block_tables is not None
        store(cache.k.flatten(0, 1), batch.slots, k)
        store(cache.v.flatten(0, 1), batch.slots, v)
    out = torch.empty((*q.shape[:2], v.shape[-1]), dtype=q.dtype, device=q.device)
    for i, length in enumerate(lens):
        rows = slice(starts[i], starts[i + 1])
        keys, values = k[rows], v[rows]
        if cache is not None:
            blocks = batch.block_tables[i].long()[: -(-length // cache.k.shape[1])]  # type: ignore[index]
            keys, values = (
                readable(take(pool, blocks)).flatten(0, 1)[:length] for pool in (cache.k, cache.v)
            )
        out[rows] = _one(q[rows], keys, values, batch.causal, scale, window, soft_cap, sinks)
    return out


def rounded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: AttentionBatch,
    bound: Bound,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Rounded:
    run = kernel("attention", "attention", q.device.type)
    return within(run(q, k, v, batch, 0, scale=scale, window=window, soft_cap=soft_cap).flatten(1), bound)


def _one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of q [Q, Hq, D] over k and v [L, Hkv, D]."""
    group = q.shape[1] // k.shape[1]
    k = k.float().repeat_interleave(group, dim=1)
    v = v.float().repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    allowed = visible(q.shape[0], k.shape[0], causal=causal, window=window, device=q.device)
    scores = scores.masked_fill(~allowed, -torch.inf)
    if sinks is not None:
        sink = sinks.float()[:, None, None].expand(-1, q.shape[0], 1)
        scores = torch.cat((scores, sink), dim=-1)
    weights = scores.softmax(dim=-1)[..., : k.shape[0]]
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
