"""Attention of one pass on GPUs: packed sequences without a cache, bidirectional or causal, with a bias or without.

FlashAttention-2 (Dao 2023). A program takes a tile of query rows of one sequence and key head (the heads of a
group are rows too). Which sequence a tile belongs to is worked out once a batch, for all layers: with hundreds of
short texts that search would cost as much as the attention itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from headrace.kernels.attention.triton_tile_map import tile_map
from headrace.kernels.attention.triton_tiles import weigh
from headrace.kernels.launch import INTERPRETED, launch_options, supports_gluon, supports_pdl

if TYPE_CHECKING:
    from headrace.layers.packed import AttentionBatch

__all__ = ["packed_attention"]

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _keys(acc, peak, norm, q, k_ptr, v_ptr, k_desc, v_desc, row, column, key_row, bias_at, reach, lo, hi, length,
          position, scale, soft_cap,
          D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
          CAUSAL: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Online softmax over the keys [lo, hi) of a sequence. ``position`` int32 [M]: of each query row.

    TMA: whole tiles come through descriptors, at (row + key, column).
    """
    d = tl.arange(0, DP)
    n = tl.arange(0, TILE)
    for key in range(lo, hi, TILE):
        at = key + n
        rows = at.to(tl.int64)[:, None] * key_row + d[None, :]
        if MASKED:
            ok = (at < length)[:, None] & (d[None, :] < D)
            k = tl.load(k_ptr + rows, mask=ok, other=0.0)
            v = tl.load(v_ptr + rows, mask=ok, other=0.0)
        elif TMA:
            k = k_desc.load([row + key, column])
            v = v_desc.load([row + key, column])
        elif D == DP:
            k = tl.load(k_ptr + rows)
            v = tl.load(v_ptr + rows)
        else:
            k = tl.load(k_ptr + rows, mask=d[None, :] < D, other=0.0)
            v = tl.load(v_ptr + rows, mask=d[None, :] < D, other=0.0)
        score = tl.dot(q, tl.trans(k), out_dtype=tl.float32, input_precision="ieee")
        factor = scale * _LOG2E
        if CAPPED:
            score = soft_cap * (2.0 * tl.sigmoid(2.0 * score * scale / soft_cap) - 1.0)
            factor = _LOG2E
        if BIAS:
            distance = tl.minimum(tl.maximum(at[None, :] - position[:, None], -reach), reach)
            score = score * scale + tl.load(bias_at[:, None] + distance)
            factor = _LOG2E
        if MASKED:
            seen = (at < length)[None, :]
            if CAUSAL:
                seen = seen & (at[None, :] <= position[:, None])
            if WINDOW > 0:
                seen = seen & (tl.abs(position[:, None] - at[None, :]) < WINDOW)
            score = tl.where(seen, score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 1) * factor)
        safe = new_peak
        if MASKED:
            safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = tl.exp2(score * factor - safe[:, None])
        alpha = tl.exp2(peak - safe)
        norm = norm * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], out_dtype=tl.float32, input_precision="ieee")
        peak = new_peak
    return acc, peak, norm


@triton.jit
def _packed(q_ptr, q_row, q_head, k_ptr, v_ptr, k_desc, v_desc, key_row, kv_head, out_ptr, map_ptr, bias_ptr,
            sinks_ptr, reach, num_heads, scale, soft_cap, factor, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
            ROWS: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, CAUSAL: tl.constexpr,
            BIAS: tl.constexpr, SINKS: tl.constexpr, TMA: tl.constexpr, FACTOR: tl.constexpr,
            PDL: tl.constexpr):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    kv_heads = num_heads // G  # neighbours are heads of the same rows, which lie side by side
    head = tl.program_id(0) % kv_heads
    tile_at = map_ptr + (tl.num_programs(0) // kv_heads - 1 - tl.program_id(0) // kv_heads) * 4
    start = tl.load(tile_at).to(tl.int64)
    length = tl.load(tile_at + 1)
    tile = tl.load(tile_at + 2)
    if length > 0:
        row = tile * ROWS + tl.arange(0, ROWS)
        position = row // G
        heads = head * G + row % G
        d = tl.arange(0, DP)
        ok = (row < length * G)[:, None] & (d[None, :] < D)
        at = (start + position)[:, None]
        q = tl.load(q_ptr + at * q_row + heads[:, None] * q_head + d[None, :], mask=ok, other=0.0)
        k_at = k_ptr + start * key_row + head * kv_head
        v_at = v_ptr + start * key_row + head * kv_head
        bias_at = bias_ptr + heads.to(tl.int64) * (2 * reach + 1) + reach
        acc = tl.zeros([ROWS, DP], tl.float32)
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        norm = tl.zeros([ROWS], tl.float32)
        # [lo, full): every row sees every key; [full, hi): masks.
        first = tile * ROWS // G
        last = tl.minimum((tile * ROWS + ROWS - 1) // G, length - 1)
        lo = 0
        full = length // TILE * TILE
        hi = length
        if CAUSAL:
            full = (first + 1) // TILE * TILE
            hi = last + 1
        if WINDOW > 0:
            lo = tl.maximum(first - WINDOW + 1, 0) // TILE * TILE
            full = lo
            hi = tl.minimum(hi, last + WINDOW)
        if WINDOW == 0:
            acc, peak, norm = _keys(acc, peak, norm, q, k_at, v_at, k_desc, v_desc, start.to(tl.int32), head * D,
                                    key_row, bias_at, reach, lo, full, length, position,
                                    scale, soft_cap, D, DP, TILE, 0, CAPPED, CAUSAL, BIAS, False, TMA)  # fmt: skip
        acc, peak, norm = _keys(acc, peak, norm, q, k_at, v_at, k_desc, v_desc, start.to(tl.int32), head * D,
                                    key_row, bias_at, reach, full, hi, length, position,
                                scale, soft_cap, D, DP, TILE, WINDOW, CAPPED, CAUSAL, BIAS, True, TMA)  # fmt: skip
        acc = weigh(acc, peak, norm, tile, head, sinks_ptr, G, ROWS, SINKS)
        if FACTOR:
            acc = acc * factor
            acc += acc * 0.0  # infinity becomes NaN: the cast to FP8 would make it 448
        result = acc.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (at * num_heads + heads[:, None]) * D + d[None, :], result, mask=ok)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    factor: float | None = None,
) -> Tensor:
    """Attend each query of a cache-less batch to its own sequence's keys.

    Args:
        q: [T, Hq, D]; k, v: [T, Hkv, D].
        bias: float32 [Hq, 2 R + 1] added to scores by distance key - query, or None.
        factor: the result is multiplied with it, and rounded to FP8.
        Others: see kernels.attention.

    Returns:
        [T, Hq, D], contiguous.
    """
    num_tokens, num_heads, dim = q.shape
    group = num_heads // k.shape[1]
    padded = max(16, triton.next_power_of_2(dim))
    if k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    assert q.stride(2) == 1 and k.stride(2) == 1
    num_seqs = batch.seq_lens.shape[0]
    plain = window is None and soft_cap is None and sinks is None and bias is None
    if plain and _specializes(q, k, v, num_seqs):
        from headrace.kernels.attention.gluon_packed import ROWS, packed_specialized

        tiles = _tiles(batch, num_tokens, 1, ROWS)
        return packed_specialized(q, k, v, tiles, scale=scale, causal=batch.causal, factor=factor)
    rows, tile, warps, stages, wanted = _shape(padded, num_tokens * group // num_seqs, q.element_size())
    tiles = _tiles(batch, num_tokens, group, rows)
    kind = q.dtype if factor is None else torch.float8_e4m3fn
    out = torch.empty(q.shape, dtype=kind, device=q.device)
    tma = (
        wanted
        and dim == padded
        and supports_pdl(q.device)
        and k.stride(0) * k.itemsize % 16 == 0
        and k.stride(1) == dim
    )
    descriptors = [_descriptor(x, tile) if tma else x for x in (k, v)]
    _packed[(tiles.shape[0] * k.shape[1],)](
        q, q.stride(0), q.stride(1), k, v, *descriptors, k.stride(0), k.stride(1), out, tiles,
        tiles if bias is None else bias, tiles if sinks is None else sinks, 0 if bias is None else bias.shape[1] // 2,
        num_heads, scale, soft_cap or 0.0, factor or 0.0,
        G=group, D=dim, DP=padded, ROWS=rows, TILE=tile, WINDOW=window or 0, CAPPED=soft_cap is not None,
        CAUSAL=batch.causal, BIAS=bias is not None, SINKS=sinks is not None, TMA=tma, FACTOR=factor is not None,
        **launch_options(q.device, warps, stages),
    )  # fmt: skip
    return out


def _specializes(q: Tensor, k: Tensor, v: Tensor, num_seqs: int) -> bool:
    """Whether warps are specialized: large batches of texts that are long on average (one H200's measurements).

    In a captured pass ``num_seqs`` is what the graph can hold.
    """
    tokens, _, dim = q.shape
    even = all(x.stride(1) == dim and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 for x in (q, k, v))
    large = tokens >= 8192 and tokens >= 200 * num_seqs
    return large and even and dim in (64, 128) and q.element_size() == 2 and supports_gluon(q.device)


def _descriptor(x: Tensor, tile: int) -> TensorDescriptor:
    """Of [T, H, D] as [T, H * D], in pieces of ``tile`` rows and one head."""
    tokens, heads, dim = x.shape
    return TensorDescriptor(x, [tokens, heads * dim], [x.stride(0), 1], [tile, dim])


def _tiles(batch: AttentionBatch, num_tokens: int, group: int, rows: int) -> Tensor:
    """The tile map of this batch: made in its first layer."""
    if batch.plan is None:
        batch.plan = {}
    return tile_map(batch.plan, batch.query_starts, batch.seq_lens, num_tokens, group, rows)


def _shape(padded: int, rows_per_seq: int, itemsize: int) -> tuple[int, int, int, int, bool]:
    """(query rows, keys, warps, stages) of a tile, and whether keys come through descriptors (measured on an H200)."""
    if INTERPRETED:
        return 16, 16, 4, 1, False
    if itemsize == 4:
        return (32, 32, 4, 2, False) if padded <= 64 else (16, 32, 4, 2, False)
    if padded > 128:
        return 64, 32, 4, 2, False
    if padded > 64:
        return (64, 32, 4, 2, False) if rows_per_seq <= 64 else (64, 32, 4, 3, True)
    return (64, 32, 4, 2, False) if rows_per_seq <= 32 else (64, 64, 4, 3, False)
