"""Attention on CPUs: views of the cache where a sequence lies in one piece, few torch calls a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.kernels.attention import reference
from headrace.kernels.attention.cache import as_cached, gather, store
from headrace.kernels.attention.fp4 import FP4
from headrace.kernels.attention.plan import Gather, Plan, Span, make_plan

if TYPE_CHECKING:
    from headrace.layers.packed import AttentionBatch

__all__ = ["attention"]


class Softmax(NamedTuple):
    """What is done to scores: see kernels.attention."""

    scale: float
    soft_cap: float | None
    sinks: Tensor | None

    @property
    def plain(self) -> bool:
        """PyTorch's own attention does it."""
        return self.soft_cap is None and self.sinks is None


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
    cache_k = cache_v = None
    if batch.caches:
        cache = batch.caches[layer]
        if cache.k.dtype is FP4:  # for looking at accuracy, not for serving
            return reference.attention(
                q, k, v, batch, layer, scale=scale, window=window, soft_cap=soft_cap, sinks=sinks
            )
        cache_k, cache_v = cache.k.flatten(0, 1), cache.v.flatten(0, 1)
        assert batch.slots is not None
        # New keys are seen as later steps will read them: what is answered may not follow how a prompt was cut.
        new_k, new_v = as_cached(k, cache_k.dtype), as_cached(v, cache_v.dtype)
        store(cache_k, batch.slots, new_k)
        store(cache_v, batch.slots, new_v)
        k, v = new_k.to(k.dtype), new_v.to(v.dtype)
    rule = Softmax(scale, soft_cap, sinks)
    plan = _plan_of(batch, window, layer, q.dtype, rule.plain)
    whole = plan.pieces[0] if len(plan.pieces) == 1 else None
    if isinstance(whole, Span) and whole.query_len * whole.count == q.shape[0]:  # else padding
        return _run_span(whole, q, k, v, cache_k, cache_v, rule)
    out = torch.empty((*q.shape[:2], v.shape[-1]), dtype=q.dtype)
    for piece in plan.pieces:
        if isinstance(piece, Span):
            end = piece.query + piece.query_len * piece.count
            out[piece.query : end] = _run_span(piece, q, k, v, cache_k, cache_v, rule)
        else:
            assert cache_k is not None
            assert cache_v is not None
            rows = _run_gather(piece, plan, q, cache_k, cache_v, rule)
            out.index_copy_(0, piece.queries, rows)
    return out


def _plan_of(batch: AttentionBatch, window: int | None, layer: int, dtype: torch.dtype, plain: bool) -> Plan:
    """The step's plan for this window, made by the first layer that has it."""
    if batch.plan is None:
        batch.plan = {}
    key = (window, dtype, plain)
    plan: Plan | None = batch.plan.get(key)
    if plan is None:
        block_size = batch.caches[layer].k.shape[1] if batch.caches else 0
        plan = batch.plan[key] = make_plan(batch, window, block_size, dtype, whole=plain)
    return plan


def _sequences(x: Tensor, start: int, count: int, length: int) -> Tensor:
    """[count, H, length, D] of packed rows x [*, H, D] from ``start`` on, without a copy."""
    row, head, dim = x.stride()
    size = (count, x.shape[1], length, x.shape[2])
    return x.as_strided(size, (row * length, head, row, dim), x.storage_offset() + start * row)


def _run_span(
    work: Span,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_k: Tensor | None,
    cache_v: Tensor | None,
    rule: Softmax,
) -> Tensor:
    """Output rows [count * query_len, Hq, D] of one span."""
    if not work.fresh:
        assert cache_k is not None
        assert cache_v is not None
        k, v = cache_k, cache_v
    keys = _sequences(k, work.key, work.count, work.key_len)
    values = _sequences(v, work.key, work.count, work.key_len)
    rows = work.count * work.query_len
    if rows != q.shape[0]:
        q = q[work.query : work.query + rows]
    return _attend(q, work.query_len, keys, values, work.mask, rule, causal=work.causal)


def _run_gather(
    work: Gather,
    plan: Plan,
    q: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    rule: Softmax,
) -> Tensor:
    """Output rows [count * query_len, Hq, D] of gathered sequences."""
    rows = work.index.shape[0]
    length = rows // work.count
    keys = gather(cache_k, work.index, plan.buffer("k", cache_k, rows))
    values = gather(cache_v, work.index, plan.buffer("v", cache_v, rows))
    keys, values = _sequences(keys, 0, work.count, length), _sequences(values, 0, work.count, length)
    queries = q.index_select(0, work.queries)
    return _attend(queries, work.query_len, keys, values, work.mask, rule)


def _attend(
    q: Tensor,
    query_len: int,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    rule: Softmax,
    *,
    causal: bool = False,
) -> Tensor:
    """Rows q [N * Q, Hq, D] of N sequences over k and v [N, Hkv, L, D]; returns [N * Q, Hq, D]."""
    rows, heads, dim = q.shape
    count, kv_heads = rows // query_len, k.shape[1]
    group = heads // kv_heads
    if k.dtype != q.dtype:
        k, v = k.to(q.dtype), v.to(q.dtype)
    if query_len == 1:
        # The heads of a group read the same keys: they are the rows of one small matrix product.
        q = q.view(rows, kv_heads, group, dim)
        out = _softmax(q, k, v, mask, rule, (kv_heads, group))
        return out.reshape(rows, heads, v.shape[-1])
    q = _sequences(q, 0, count, query_len)
    lie: tuple[int, ...] = (heads, 1)
    if group > 1:
        if count == 1:  # views: a key head is a batch entry, seen by the heads of its group
            q = q.view(kv_heads, group, query_len, dim)
            lie = (kv_heads, group, 1)
            k, v = (x.transpose(0, 1).expand(-1, group, -1, -1) for x in (k, v))
        else:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if causal:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=rule.scale)
    else:
        out = _softmax(q, k, v, mask, rule, lie)
    out = out.reshape(count, heads, query_len, v.shape[-1])
    return out.transpose(1, 2).reshape(rows, heads, v.shape[-1])


def _softmax(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: Softmax, heads: tuple[int, ...]
) -> Tensor:
    """Attention of q [N, H, Q, D] over k and v [N, H, L, D]; ``heads`` is how sinks lie along N, H and Q."""
    if rule.plain:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=rule.scale)
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2)).mul_(rule.scale)
    if rule.soft_cap is not None:
        scores.div_(rule.soft_cap).tanh_().mul_(rule.soft_cap)
    if mask is not None:
        scores += mask
    norm = scores.logsumexp(-1, keepdim=True)
    if rule.sinks is not None:
        norm = norm.logaddexp(rule.sinks.float().view(*heads, 1))
    return torch.matmul(scores.sub_(norm).exp_(), v.float()).to(q.dtype)
