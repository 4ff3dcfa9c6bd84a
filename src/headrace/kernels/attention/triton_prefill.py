"""Attention of many new tokens: packed sequences of any lengths, causal over a paged cache, or without a cache.

FlashAttention-2 (Dao 2023): a program takes a tile of query rows of one key head (the heads of a group are rows
too) and walks over the keys. Tiles of keys start at multiples of the tile from position 0, wherever a chunk of
the prompt begins, so a row's result does not depend on how the prompt was cut.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.kernels.attention.fp4 import FP4
from headrace.kernels.attention.triton_decode import padded_dim
from headrace.kernels.attention.triton_fp4 import load_fp4
from headrace.kernels.attention.triton_tile_map import mapped_tile, tile_map
from headrace.kernels.attention.triton_tiles import query_rows, scores, soften, weigh
from headrace.kernels.attention.triton_words import to_half_range
from headrace.kernels.launch import INTERPRETED, launch_options

__all__ = ["prefill_attention"]


@triton.jit
def _span(acc, peak, norm, q, k_ptr, v_ptr, table_ptr, key_row, first_key, kv_block, kv_token, lo, hi, length,
          last, scales, soft_cap, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
          WINDOW: tl.constexpr, CAPPED: tl.constexpr, CAUSAL: tl.constexpr, PAGED: tl.constexpr,
          MASKED: tl.constexpr):  # fmt: skip
    """Online softmax over the keys [lo, hi). ``last`` int32 [M]: position of each row; ``scales`` of its scores."""
    dtype: tl.constexpr = q.dtype
    d = tl.arange(0, DP)
    n = tl.arange(0, TILE)
    # Blocks are read one tile ahead of their keys (see _load_tile of triton_decode).
    following = tl.zeros([TILE], tl.int32)
    if PAGED:
        following = tl.load(table_ptr + (lo + n).to(tl.uint32) // BLOCK, mask=lo + n < length, other=0)
    for key in range(lo, hi, TILE):
        at = key + n
        ok = at < length
        if PAGED:
            block = following.to(tl.int64)
            ahead = at + TILE
            following = tl.load(table_ptr + ahead.to(tl.uint32) // BLOCK, mask=ahead < length, other=0)
            slot = block * kv_block + (at.to(tl.uint32) % BLOCK).to(tl.int32) * kv_token
        else:
            slot = (first_key + at).to(tl.int64) * key_row
        if k_ptr.dtype.element_ty == tl.uint8:
            k = load_fp4(k_ptr, slot, ok, TILE, D, DP, dtype)
            v = load_fp4(v_ptr, slot, ok, TILE, D, DP, dtype)
        elif MASKED:
            kv_ok = ok[:, None] & (d[None, :] < D)
            k = tl.load(k_ptr + slot[:, None] + d[None, :], mask=kv_ok, other=0.0)
            v = tl.load(v_ptr + slot[:, None] + d[None, :], mask=kv_ok, other=0.0)
        elif D == DP:
            k = tl.load(k_ptr + slot[:, None] + d[None, :])
            v = tl.load(v_ptr + slot[:, None] + d[None, :])
        else:
            k = tl.load(k_ptr + slot[:, None] + d[None, :], mask=d[None, :] < D, other=0.0)
            v = tl.load(v_ptr + slot[:, None] + d[None, :], mask=d[None, :] < D, other=0.0)
        score = scores(q, k)
        seen = ok[None, :]
        if MASKED and CAUSAL:
            seen = seen & (at[None, :] <= last[:, None])
        if MASKED and WINDOW > 0:
            seen = seen & (tl.abs(last[:, None] - at[None, :]) < WINDOW)
        p, acc, peak, norm = soften(acc, peak, norm, score, seen, scales, soft_cap, CAPPED, MASKED)
        acc = tl.dot(p.to(dtype), v.to(dtype), acc, out_dtype=tl.float32, input_precision="ieee")
    return acc, peak, norm


@triton.jit
def _prefill(
    q_ptr, q_row, q_head, k_ptr, v_ptr, key_row, kv_block, kv_token, kv_head, out_ptr,
    tables_ptr, table_row, map_ptr, lens_ptr, sinks_ptr, num_heads, scale, soft_cap,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, CAUSAL: tl.constexpr, PAGED: tl.constexpr,
    SINKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    turn = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    start, new, tile, seq = mapped_tile(map_ptr, turn)
    if new > 0:
        length = tl.load(lens_ptr + seq)
        q, token, out, ok = query_rows(
            q_ptr, q_row, q_head, start, new, tile, head, num_heads, G, ROWS, D, DP
        )
        last = length - new + token
        scales = tl.full([ROWS], 1.0, tl.float32) * scale
        if k_ptr.dtype.element_ty == tl.float8e4nv and q_ptr.dtype.element_ty != tl.float32:
            # FP8 numbers become float16 by one instruction, bfloat16 by several slow ones.
            q, power = to_half_range(q)
            scales = scales * power
        acc = tl.zeros([ROWS, DP], tl.float32)
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        norm = tl.zeros([ROWS], tl.float32)
        # [lo, full): every row sees every key; [full, hi): masks.
        first_pos = length - new + tile * ROWS // G
        last_pos = tl.minimum(length - new + (tile * ROWS + ROWS - 1) // G, length - 1)
        lo = 0
        full = length // TILE * TILE
        hi = length
        if CAUSAL:
            full = tl.minimum(first_pos + 1, length) // TILE * TILE
            hi = last_pos + 1
        if WINDOW > 0:
            lo = tl.maximum(first_pos - WINDOW + 1, 0) // TILE * TILE
            full = lo
            hi = tl.minimum(hi, last_pos + WINDOW)
        table_ptr = tables_ptr + seq.to(tl.int64) * table_row
        k_at = k_ptr + head * kv_head
        v_at = v_ptr + head * kv_head
        if WINDOW == 0:
            acc, peak, norm = _span(acc, peak, norm, q, k_at, v_at, table_ptr, key_row, start, kv_block, kv_token,
                                    lo, full, length, last, scales, soft_cap, D, DP, BLOCK, TILE, 0, CAPPED, CAUSAL,
                                    PAGED, False)  # fmt: skip
        acc, peak, norm = _span(acc, peak, norm, q, k_at, v_at, table_ptr, key_row, start, kv_block, kv_token,
                                full, hi, length, last, scales, soft_cap, D, DP, BLOCK, TILE, WINDOW, CAPPED, CAUSAL,
                                PAGED, True)  # fmt: skip
        acc = weigh(acc, peak, norm, tile, head, sinks_ptr, G, ROWS, SINKS)
        tl.store(out_ptr + out, acc.to(out_ptr.dtype.element_ty), mask=ok)


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    tables: Tensor | None = None,
    skip_single: bool = False,
    skip_fresh: bool = False,
    fixed: bool = False,
    plan: dict[object, Any] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attend each query to its own sequence's keys.

    Args:
        q: [T, Hq, D].
        k, v: with ``tables`` the cache [num_blocks, block_size, Hkv, D] (of FP4: its rows), else this batch's
            [T, Hkv, D].
        query_starts: int32 [S + 1].
        seq_lens: int32 [S], keys of each sequence.
        sinks: float32 [Hq], see kernels.attention.
        tables: int32 [S, B].
        skip_single: leave sequences of one new token to decode_attention.
        skip_fresh: leave sequences without earlier keys to fresh_attention.
        fixed: tiles of one size whatever the batch.
        plan: of the batch, see tile_map.
        out: [T, Hq, D] contiguous.

    Returns:
        out.
    """
    if k.dtype is FP4:
        k, v = k.view(torch.uint8), v.view(torch.uint8)
    num_tokens, num_heads, head_dim = q.shape
    num_seqs = seq_lens.shape[0]
    group = num_heads // k.shape[-2]
    padded = padded_dim(head_dim)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    assert q.stride(2) == 1 and k.stride(-1) == 1 and k.stride() == v.stride()
    paged = tables is not None
    per_seq = 0 if fixed else num_tokens * group // max(num_seqs, 1)
    rows, tile, warps, stages = _shape(padded, per_seq, q.element_size())
    tiles = tile_map(
        plan, query_starts, seq_lens, num_tokens, group, rows,
        skip_single=skip_single, fresh=False if skip_fresh else None,
    )  # fmt: skip
    _prefill[(tiles.shape[0], num_heads // group)](
        q, q.stride(0), q.stride(1), k, v, 0 if paged else k.stride(0), k.stride(0), k.stride(-3), k.stride(-2), out,
        seq_lens if tables is None else tables, 0 if tables is None else tables.stride(0), tiles, seq_lens,
        q if sinks is None else sinks, num_heads, scale, soft_cap or 0.0,
        G=group, D=head_dim, DP=padded, BLOCK=k.shape[1] if paged else 1, ROWS=rows, TILE=tile,
        WINDOW=window or 0, CAPPED=soft_cap is not None, CAUSAL=causal, PAGED=paged, SINKS=sinks is not None,
        **launch_options(q.device, warps, stages),
    )  # fmt: skip
    return out


def _shape(padded: int, rows_per_seq: int, itemsize: int) -> tuple[int, int, int, int]:
    """(query rows, keys, warps, stages) of a tile."""
    if INTERPRETED:
        return 16, 16, 4, 1
    if itemsize == 4:
        return 32, 32, 4, 2
    if padded > 128:
        return 64, 32, 4, 2
    if rows_per_seq <= 64:
        return 64, 64, 4, 3
    return 128, 64, 8, 3
