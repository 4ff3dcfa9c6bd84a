"""Causal attention of whole prompts: all keys are this batch's own, so they lie in rows that a copy engine can fetch.

The arithmetic of triton_prefill, with keys and values brought by Hopper's tensor memory accelerator: no addresses
in registers, which leaves room for tiles twice as wide.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from headrace.kernels.launch import INTERPRETED, launch_options, sequence_lanes, supports_pdl

__all__ = ["FreshShape", "fresh_attention", "fresh_covers", "fresh_shape"]


class FreshShape(NamedTuple):
    """Query rows and keys of a tile, warps, stages of loads."""

    rows: int
    tile: int
    warps: int
    stages: int


def fresh_shape() -> FreshShape:
    """Best of eight for a prompt of 4,096 tokens on one H200: two such programs run on a multiprocessor."""
    if INTERPRETED:
        return FreshShape(16, 16, 4, 1)
    return FreshShape(64, 64, 4, 3)


def fresh_covers(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the copy engine can read these keys, [T, Hkv, D]: neighbouring heads of 64 or 128 16-bit numbers."""
    fits = (
        k.shape[2] in (64, 128)
        and k.stride(1) == k.shape[2]
        and k.stride(2) == 1
        and k.stride() == v.stride()
    )
    fits = fits and k.element_size() == 2 and k.stride(0) % 8 == 0
    aligned = k.data_ptr() % 16 == 0 and v.data_ptr() % 16 == 0
    return fits and aligned and (INTERPRETED or supports_pdl(q.device))


@triton.jit
def _span(acc, peak, norm, q, k_desc, v_desc, column, start, lo, hi, length, last, scale, soft_cap,
          TILE: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Online softmax over the keys [lo, hi). ``last`` int32 [M]: position of each row."""
    n = tl.arange(0, TILE)
    for key in range(lo, hi, TILE):
        k = k_desc.load([start + key, column])
        score = tl.dot(q, tl.trans(k), out_dtype=tl.float32, input_precision="ieee")
        factor = scale * 1.4426950408889634
        if CAPPED:
            score = soft_cap * (2.0 * tl.sigmoid(2.0 * score * scale / soft_cap) - 1.0)
            factor = 1.4426950408889634
        at = key + n
        if MASKED:
            seen = (at[None, :] <= last[:, None]) & (at < length)[None, :]
            if WINDOW > 0:
                seen = seen & (last[:, None] - at[None, :] < WINDOW)
            score = tl.where(seen, score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 1) * factor)
        if MASKED:
            safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        else:
            safe = new_peak
        p = tl.exp2(score * factor - safe[:, None])
        alpha = tl.exp2(peak - safe)
        norm = norm * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        v = v_desc.load([start + key, column])
        if MASKED:  # the rows behind a sequence are its neighbour's: zero times their infinity must not count
            v = tl.where((at < length)[:, None], v, 0.0)
        acc = tl.dot(p.to(q.dtype), v, acc, out_dtype=tl.float32, input_precision="ieee")
        peak = new_peak
    return acc, peak, norm


@triton.jit
def _fresh(
    q_ptr, q_row, q_head, k_desc, v_desc, out_ptr, starts_ptr, lens_ptr, num_seqs, num_heads, scale, soft_cap,
    G: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, SEQS: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, SKIP_SINGLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    s_all = tl.arange(0, SEQS)
    start_all = tl.load(starts_ptr + s_all, mask=s_all < num_seqs, other=0)
    new_all = tl.load(starts_ptr + s_all + 1, mask=s_all < num_seqs, other=0) - start_all
    new_all = tl.where(new_all == tl.load(lens_ptr + s_all, mask=s_all < num_seqs, other=0), new_all, 0)
    if SKIP_SINGLE:
        new_all = tl.where(new_all == 1, 0, new_all)
    tiles_all = (new_all * G + ROWS - 1) // ROWS
    ends = tl.cumsum(tiles_all, 0)
    if tile < tl.max(ends, 0):
        seq = tl.sum((ends <= tile).to(tl.int32), 0)
        tile = tile - tl.sum(tl.where(s_all < seq, tiles_all, 0), 0)
        start = tl.load(starts_ptr + seq)
        length = tl.load(starts_ptr + seq + 1) - start
        row = tile * ROWS + tl.arange(0, ROWS)
        last = row // G
        d = tl.arange(0, D)
        row_ok = (row < length * G)[:, None]
        rows = (start + last).to(tl.int64)
        heads = head * G + row % G
        q = tl.load(
            q_ptr + rows[:, None] * q_row + heads[:, None] * q_head + d[None, :], mask=row_ok, other=0.0
        )
        acc = tl.zeros([ROWS, D], tl.float32)
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        norm = tl.zeros([ROWS], tl.float32)
        # [lo, full): every row sees every key; [full, hi): masks.
        first_pos = tile * ROWS // G
        lo = 0
        full = tl.minimum(first_pos + 1, length) // TILE * TILE
        hi = tl.minimum((tile * ROWS + ROWS - 1) // G, length - 1) + 1
        if WINDOW > 0:
            lo = tl.maximum(first_pos - WINDOW + 1, 0) // TILE * TILE
            full = lo
        if WINDOW == 0:
            acc, peak, norm = _span(acc, peak, norm, q, k_desc, v_desc, head * D, start, lo, full, length, last,
                                    scale, soft_cap, TILE, 0, CAPPED, False)  # fmt: skip
        acc, peak, norm = _span(acc, peak, norm, q, k_desc, v_desc, head * D, start, full, hi, length, last,
                                scale, soft_cap, TILE, WINDOW, CAPPED, True)  # fmt: skip
        acc = acc / tl.where(norm > 0.0, norm, 1.0)[:, None]
        o_at = out_ptr + (rows[:, None] * num_heads + heads[:, None]) * D + d[None, :]
        tl.store(o_at, acc.to(q.dtype), mask=row_ok)


def fresh_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    skip_single: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Attend each query of the sequences that have no earlier keys to their keys up to itself.

    Args:
        q: [T, Hq, D]; k, v: [T, Hkv, D], see fresh_covers.
        query_starts: int32 [S + 1].
        seq_lens: int32 [S], keys of each sequence.
        skip_single: leave sequences of one token alone.
        out: [T, Hq, D] contiguous.

    Returns:
        out.
    """
    num_tokens, num_heads, dim = q.shape
    num_seqs, kv_heads = query_starts.shape[0] - 1, k.shape[1]
    group = num_heads // kv_heads
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    assert q.stride(2) == 1
    shape = fresh_shape()
    described = [
        TensorDescriptor(x, [num_tokens, kv_heads * dim], [x.stride(0), 1], [shape.tile, dim]) for x in (k, v)
    ]
    grid = (num_tokens * group // shape.rows + num_seqs, kv_heads)
    _fresh[grid](
        q, q.stride(0), q.stride(1), *described, out, query_starts, seq_lens, num_seqs, num_heads, scale,
        soft_cap or 0.0,
        G=group, D=dim, ROWS=shape.rows, TILE=shape.tile, SEQS=sequence_lanes(num_seqs), WINDOW=window or 0,
        CAPPED=soft_cap is not None, SKIP_SINGLE=skip_single,
        **launch_options(q.device, shape.warps, shape.stages),
    )  # fmt: skip
    return out
