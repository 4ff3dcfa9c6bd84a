"""Attention on CPUs: views of the cache where a sequence lies in one piece, few torch calls a layer.

A step's sequences become a short list of pieces of work, planned once for each window and shared by all
layers: a ``_Span`` is one sequence whose keys are one view, a ``_Gather`` is one or several sequences whose
keys are copied together first (short ones, to pay Python's price once, and those scattered over the pool).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.kernels.attention.reference import visible

if TYPE_CHECKING:
    from headrace.layers.packed import AttentionBatch

__all__ = ["attention"]

# Up to this many keys, copying them beside those of other decoding sequences costs less than own calls.
_GATHER_KEYS = 192


@dataclass(slots=True, frozen=True)
class _Span:
    """``query_len`` queries from row ``query``, over ``key_len`` rows from ``key``, ``count`` times in a row.

    ``fresh``: the keys are rows of this step's k and v, else of the flattened cache. ``mask`` is added to the
    scores, [query_len, key_len] or None; ``causal`` is only for square ones without a mask.
    """

    query: int
    query_len: int
    key: int
    key_len: int
    count: int
    fresh: bool
    causal: bool
    mask: Tensor | None


@dataclass(slots=True, frozen=True)
class _Gather:
    """Sequences of ``query_len`` queries each whose keys are copied: ``index`` [N * L] into the cache's rows.

    ``queries`` is int64 [N * query_len], rows of q. Rows past a sequence's end repeat a key of its own
    and are masked: foreign or never written rows might hold NaN. ``mask`` is [N, 1, 1, L] for single queries,
    [query_len, L] for one sequence of more, or None.
    """

    queries: Tensor
    query_len: int
    index: Tensor
    count: int
    mask: Tensor | None


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
) -> Tensor:
    cache_k = cache_v = None
    if batch.caches:
        cache = batch.caches[layer]
        cache_k, cache_v = cache.k.flatten(0, 1), cache.v.flatten(0, 1)
        assert batch.slots is not None
        cache_k.index_copy_(0, batch.slots, k if k.dtype == cache_k.dtype else k.to(cache_k.dtype))
        cache_v.index_copy_(0, batch.slots, v if v.dtype == cache_v.dtype else v.to(cache_v.dtype))
    if batch.plan is None:
        batch.plan = {}
    key = ("cpu", window, q.dtype)
    plan = batch.plan.get(key)
    if plan is None:
        block_size = batch.caches[layer].k.shape[1] if batch.caches else 0
        plan = batch.plan[key] = _plan(batch, window, block_size, q.dtype)
    if len(plan) == 1 and isinstance(plan[0], _Span):
        return _run_span(plan[0], q, k, v, cache_k, cache_v, scale, soft_cap)
    out = torch.empty((*q.shape[:2], v.shape[-1]), dtype=q.dtype)
    for work in plan:
        if isinstance(work, _Span):
            end = work.query + work.query_len * work.count
            out[work.query : end] = _run_span(work, q, k, v, cache_k, cache_v, scale, soft_cap)
        else:
            assert cache_k is not None
            assert cache_v is not None
            out[work.queries] = _run_gather(work, q, cache_k, cache_v, scale, soft_cap)
    return out


def _rows(x: Tensor, start: int, count: int, length: int, group: int) -> Tensor:
    """[count, Hkv, group, length, D] of x [*, Hkv * group, D] without a copy."""
    row, head, dim = x.stride()
    heads = x.shape[1] // group
    return x.as_strided(
        (count, heads, group, length, x.shape[2]),
        (row * length, head * group, head, row, dim),
        x.storage_offset() + start * row,
    )


def _run_span(
    work: _Span,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_k: Tensor | None,
    cache_v: Tensor | None,
    scale: float,
    soft_cap: float | None,
) -> Tensor:
    """Output rows [count * query_len, Hq, D] of one span."""
    if not work.fresh:
        assert cache_k is not None
        assert cache_v is not None
        k, v = cache_k, cache_v
    group = q.shape[1] // k.shape[1]
    queries = _rows(q, work.query, work.count, work.query_len, group)
    keys = _rows(k, work.key, work.count, work.key_len, 1)
    values = _rows(v, work.key, work.count, work.key_len, 1)
    return _attend(queries, keys, values, work.mask, work.causal, scale, soft_cap)


def _run_gather(
    work: _Gather, q: Tensor, cache_k: Tensor, cache_v: Tensor, scale: float, soft_cap: float | None
) -> Tensor:
    """Output rows [N * query_len, Hq, D] of gathered sequences."""
    length = work.index.shape[0] // work.count
    group = q.shape[1] // cache_k.shape[1]
    keys = _rows(cache_k.index_select(0, work.index), 0, work.count, length, 1)
    values = _rows(cache_v.index_select(0, work.index), 0, work.count, length, 1)
    queries = _rows(q.index_select(0, work.queries), 0, work.count, work.query_len, group)
    return _attend(queries, keys, values, work.mask, False, scale, soft_cap)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, soft_cap: float | None
) -> Tensor:
    """q [N, Hkv, G, Q, D] over k and v [N, Hkv, 1, L, D]; returns [N * Q, Hq, D]."""
    count, kv_heads, group, query_len, _ = q.shape
    if k.dtype != q.dtype:
        k, v = k.to(q.dtype), v.to(q.dtype)
    if soft_cap is not None:
        out = _capped(q, k, v, mask, causal, scale, soft_cap)
    elif query_len == 1:
        # The heads of a group read the same keys: they are the rows of one small matrix product.
        out = F.scaled_dot_product_attention(
            q.squeeze(3), k.squeeze(2), v.squeeze(2), attn_mask=mask, scale=scale
        )
        return out.reshape(count, kv_heads * group, v.shape[-1])
    else:
        heads = (count, kv_heads * group, query_len, q.shape[-1])
        k = k.expand(-1, -1, group, -1, -1)
        v = v.expand(-1, -1, group, -1, -1)
        if count == 1:  # views: every key head stands for a batch entry of ``group`` heads
            q, k, v = q[0], k[0], v[0]
        else:
            q, k, v = q.reshape(heads), k.flatten(1, 2), v.flatten(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
        out = out.view(count, kv_heads, group, query_len, v.shape[-1])
    return out.permute(0, 3, 1, 2, 4).reshape(count * query_len, kv_heads * group, v.shape[-1])


def _capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, soft_cap: float
) -> Tensor:
    """The same with soft-capped scores, [N, Hkv, G, Q, D]; scores and weights are float32."""
    scores = (
        torch.matmul(q.float(), k.float().transpose(-1, -2)).mul_(scale / soft_cap).tanh_().mul_(soft_cap)
    )
    if causal:
        mask = _additive(
            visible(q.shape[3], k.shape[3], causal=True, window=None, device=q.device), torch.float32
        )
    if mask is not None:
        scores += mask if mask.dim() == 2 else mask.unsqueeze(1)
    return torch.matmul(scores.softmax(-1), v.float()).to(q.dtype)


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where allowed, minus infinity elsewhere: what attention adds to the scores."""
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -torch.inf)


def _plan(
    batch: AttentionBatch, window: int | None, block_size: int, dtype: torch.dtype
) -> list[_Span | _Gather]:
    """Pieces of work for one window, in which all rows of q occur once."""
    query_lens, seq_lens, blocks = _host_facts(batch)
    plan: list[_Span | _Gather] = []
    gathered: list[tuple[int, int, int, int]] = []  # (sequence, first query row, first key, keys)
    masks: dict[tuple[int, int, int], Tensor | None] = {}
    row = 0
    for i, (query_len, key_len) in enumerate(zip(query_lens, seq_lens)):
        fresh = query_len == key_len
        # Keys before the window of the first query are seen by none.
        first = 0 if window is None or not batch.causal else max(0, key_len - query_len - window + 1)
        start = row if fresh else _consecutive(blocks[i], first, key_len, block_size)
        short = query_len == 1 and key_len - first <= _GATHER_KEYS and len(query_lens) > 1
        if not fresh and (start is None or short):
            gathered.append((i, row, first, key_len - first))
        else:
            assert start is not None
            mask = None
            plain = batch.causal and fresh and query_len > 1 and (window is None or key_len <= window)
            if not plain:
                mask = _span_mask(masks, query_len, key_len, first, batch.causal, window, dtype)
            span = _Span(row, query_len, start, key_len - first, 1, fresh, plain, mask)
            _append_span(plan, span)
        row += query_len
    for members in _buckets(gathered, query_lens):
        plan.append(_plan_gather(members, query_lens, blocks, block_size, window, batch.causal, dtype))
    return plan


def _host_facts(batch: AttentionBatch) -> tuple[list[int], list[int], list[list[int]]]:
    """Query lengths, key lengths and blocks as lists."""
    query_lens, seq_lens = batch.host_query_lens, batch.host_seq_lens
    if query_lens is None:
        query_lens = batch.query_starts.diff().tolist()
    if seq_lens is None:
        seq_lens = batch.seq_lens.tolist()
    blocks = batch.host_blocks
    if blocks is None:
        blocks = [] if batch.block_tables is None else batch.block_tables.tolist()
    return query_lens, seq_lens, blocks


def _consecutive(blocks: list[int], first: int, end: int, block_size: int) -> int | None:
    """The cache's row of key ``first`` if all keys up to ``end`` follow it there, else None."""
    low, high = first // block_size, (end - 1) // block_size
    base = blocks[low]
    if blocks[high] - base != high - low or blocks[low : high + 1] != list(
        range(base, base + high - low + 1)
    ):
        return None
    return base * block_size + first % block_size


def _span_mask(
    masks: dict[tuple[int, int, int], Tensor | None],
    query_len: int,
    key_len: int,
    first: int,
    causal: bool,
    window: int | None,
    dtype: torch.dtype,
) -> Tensor | None:
    """Additive mask of the keys from ``first`` on, or None where all may be seen; equal shapes share one."""
    shape = (query_len, key_len, first)
    if shape not in masks:
        allowed = visible(query_len, key_len, causal=causal, window=window, device=torch.device("cpu"))[
            :, first:
        ]
        masks[shape] = None if bool(allowed.all()) else _additive(allowed, dtype)
    return masks[shape]


def _append_span(plan: list[_Span | _Gather], span: _Span) -> None:
    """Add a span, joined to the one before it where both are fresh and of one shape (equal-length inputs)."""
    last = plan[-1] if plan else None
    if (
        isinstance(last, _Span)
        and last.fresh
        and span.fresh
        and last.query_len == span.query_len
        and last.query + last.query_len * last.count == span.query  # gathered ones may lie between
        and last.mask is span.mask
    ):
        plan[-1] = _Span(
            last.query, last.query_len, last.key, last.key_len, last.count + 1, True, last.causal, last.mask
        )
    else:
        plan.append(span)


def _buckets(
    gathered: list[tuple[int, int, int, int]], query_lens: list[int]
) -> list[list[tuple[int, int, int, int]]]:
    """Groups to gather together: decoding sequences of similar length, and each longer query alone."""
    buckets: dict[object, list[tuple[int, int, int, int]]] = {}
    for member in gathered:
        sequence, _, _, keys = member
        # A power of two of keys a bucket: padding at most doubles the copy. All short ones go together.
        size = max(keys, _GATHER_KEYS // 2).bit_length()
        buckets.setdefault(size if query_lens[sequence] == 1 else ("alone", sequence), []).append(member)
    return list(buckets.values())


def _plan_gather(
    members: list[tuple[int, int, int, int]],
    query_lens: list[int],
    blocks: list[list[int]],
    block_size: int,
    window: int | None,
    causal: bool,
    dtype: torch.dtype,
) -> _Gather:
    """One gather; all members have one query, or there is only one member."""
    query_len = query_lens[members[0][0]]
    longest = max(keys for *_, keys in members)
    lens = torch.tensor([keys for *_, keys in members])[:, None]
    firsts = torch.tensor([first for _, _, first, _ in members])[:, None]
    keys = torch.arange(longest).expand(len(members), -1)
    positions = firsts + torch.minimum(keys, lens - 1)
    width = max(len(blocks[sequence]) for sequence, *_ in members)
    table = torch.tensor([blocks[s] + [0] * (width - len(blocks[s])) for s, *_ in members])
    index = table.gather(1, positions // block_size) * block_size + positions % block_size
    rows = torch.tensor([row for _, row, *_ in members])[:, None] + torch.arange(query_len)
    mask: Tensor | None = None
    if query_len == 1:
        if any(member[3] != longest for member in members):
            mask = _additive(keys < lens, dtype)[:, None, None, :]
    else:
        _, _, first, count = members[0]
        allowed = visible(query_len, first + count, causal=causal, window=window, device=index.device)
        mask = _additive(allowed[:, first:], dtype)
    return _Gather(rows.flatten(), query_len, index.flatten(), len(members), mask)
