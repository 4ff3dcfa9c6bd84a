"""Attention on GPUs: cache write, then prefill and decode kernels, each on the sequences it is for."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.kernels.attention.fp4 import FP4
from headrace.kernels.attention.triton_decode import DecodeWorkspace, decode_attention
from headrace.kernels.attention.triton_fp4 import round_fp4, store_fp4
from headrace.kernels.attention.triton_fresh import fresh_attention, fresh_covers
from headrace.kernels.attention.triton_packed import packed_attention
from headrace.kernels.attention.triton_prefill import prefill_attention
from headrace.kernels.launch import launch_options
from headrace.kernels.rounding import Bound, Rounded

if TYPE_CHECKING:
    from headrace.layers.packed import AttentionBatch, LayerCache

__all__ = ["attention", "rounded_attention", "write_cache"]


@triton.jit
def _write_cache(k_ptr, v_ptr, row, head_stride, k_cache, v_cache, cache_block, cache_token, cache_head, slots_ptr,
                 BLOCK: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                 PDL: tl.constexpr):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    h = tl.arange(0, HP)[:, None]
    d = tl.arange(0, DP)[None, :]
    ok = (h < H) & (d < D) & (slot >= 0)
    at = token * row + h * head_stride + d
    to = (slot // BLOCK) * cache_block + (slot % BLOCK) * cache_token + h * cache_head
    k = tl.load(k_ptr + at, mask=ok, other=0.0)
    v = tl.load(v_ptr + at, mask=ok, other=0.0)
    if k_cache.dtype.element_ty == tl.uint8:
        heads = tl.arange(0, HP)
        rows = (slot // BLOCK) * cache_block + (slot % BLOCK) * cache_token + heads * cache_head
        row_ok = (heads < H) & (slot >= 0)
        codes, scale, _ = round_fp4(k.to(tl.float32), HP, DP)
        store_fp4(k_cache, rows, codes, scale, row_ok, D, DP)
        codes, scale, _ = round_fp4(v.to(tl.float32), HP, DP)
        store_fp4(v_cache, rows, codes, scale, row_ok, D, DP)
    else:
        tl.store(k_cache + to + d, k.to(k_cache.dtype.element_ty), mask=ok)
        tl.store(v_cache + to + d, v.to(v_cache.dtype.element_ty), mask=ok)


def write_cache(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Store k and v [T, Hkv, D] at ``slots`` int64 [T] of caches [num_blocks, block_size, Hkv, D]; -1: nowhere."""
    if k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    assert k.stride(2) == 1 and k_cache.stride() == v_cache.stride() and k_cache.stride(3) == 1
    heads, dim = k.shape[1:]
    if k_cache.dtype is FP4:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    _write_cache[(k.shape[0],)](
        k, v, k.stride(0), k.stride(1), k_cache, v_cache, *k_cache.stride()[:3], slots,
        BLOCK=k_cache.shape[1], H=heads, HP=triton.next_power_of_2(heads), D=dim, DP=triton.next_power_of_2(dim),
        **launch_options(k.device, 4, 1),
    )  # fmt: skip


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
    if not batch.caches:
        return packed_attention(q, k, v, batch, scale=scale, window=window, soft_cap=soft_cap, sinks=sinks)
    cache = batch.caches[layer]
    assert batch.slots is not None and batch.block_tables is not None
    write_cache(k, v, cache.k, cache.v, batch.slots)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    batch.plan = {} if batch.plan is None else batch.plan  # shared by all layers
    options = {"scale": scale, "window": window, "soft_cap": soft_cap, "sinks": sinks, "out": out}
    lone = not batch.fixed and (batch.decode_only or batch.some_single)
    if batch.max_query_len == 1 and not batch.fixed:
        _attend_lone(q, k, batch, cache, **options)
        return out
    if lone and _overlaps(q):  # old keys are read while prompts are multiplied
        side, main = _side_stream(q.device), torch.cuda.current_stream(q.device)
        _workspace(batch, q, k)  # memory of the main stream
        side.wait_stream(main)
        with torch.cuda.stream(side):
            _attend_lone(q, k, batch, cache, beside=True, **options)
        _attend_prompts(q, k, v, batch, cache, **options)
        main.wait_stream(side)
        return out
    _attend_prompts(q, k, v, batch, cache, **options)
    if lone:
        _attend_lone(q, k, batch, cache, **options)
    return out


def _overlaps(q: Tensor) -> bool:
    return q.is_cuda


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _attend_prompts(
    q: Tensor, k: Tensor, v: Tensor, batch: AttentionBatch, cache: LayerCache, **options: Any
) -> None:
    """Sequences with several new tokens; in a fixed order those with one, too."""
    # Keys that lie in this batch are read there: the same numbers without the way through the table.
    here = k.dtype == cache.k.dtype and k.stride() == v.stride()
    whole = here and batch.causal and not batch.fixed and fresh_covers(q, k, v)
    shared: dict[str, Any] = {**options, "plan": batch.plan}
    if whole:
        fresh_attention(q, k, v, batch.query_starts, batch.seq_lens, skip_single=True, **shared)
    if not (whole and batch.fresh):
        # Not in a fixed order: lone new tokens, whose earlier keys are in the cache, come here too then.
        here = here and batch.fresh and not batch.fixed
        prefill_attention(
            q, k if here else cache.k, v if here else cache.v, batch.query_starts, batch.seq_lens,
            causal=batch.causal, tables=None if here else batch.block_tables, skip_single=not batch.fixed,
            skip_fresh=whole, fixed=batch.fixed, **shared,
        )  # fmt: skip


def _attend_lone(q: Tensor, k: Tensor, batch: AttentionBatch, cache: LayerCache, **options: Any) -> None:
    """Sequences with one new token."""
    assert batch.block_tables is not None
    decode_attention(
        q, cache.k, cache.v, batch.block_tables, batch.seq_lens, _workspace(batch, q, k),
        query_starts=None if batch.decode_only else batch.query_starts, **options,
    )  # fmt: skip


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
    out = packed_attention(q, k, v, batch, scale=scale, window=window, soft_cap=soft_cap, factor=bound.factor)
    return Rounded(out.flatten(1), bound.scale)


def _workspace(batch: AttentionBatch, q: Tensor, k: Tensor) -> DecodeWorkspace:
    """One workspace for all layers of a batch."""
    if batch.plan is None:
        batch.plan = {}
    found = batch.plan.get("decode workspace")
    if found is None:
        found = DecodeWorkspace.allocate(
            batch.seq_lens.shape[0], q.shape[1], k.shape[1], q.shape[2], q.device
        )
        batch.plan["decode workspace"] = found
    return found
