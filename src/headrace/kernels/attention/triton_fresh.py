"""Causal attention of whole prompts: all keys are this batch's own, so they lie in rows that a copy engine can fetch.

The arithmetic of triton_prefill, with keys and values brought by Hopper's tensor memory accelerator: no addresses
in registers, which leaves room for the scores of two tiles at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from headrace.kernels.attention.triton_tile_map import mapped_tile, tile_map
from headrace.kernels.attention.triton_tiles import query_rows, scores, soften, weigh
from headrace.kernels.launch import INTERPRETED, launch_options, supports_gluon, supports_pdl

__all__ = ["FreshShape", "fresh_attention", "fresh_covers", "fresh_shape"]


class FreshShape(NamedTuple):
    """Query rows and keys of a tile, warps, stages of loads."""

    rows: int
    tile: int
    warps: int
    stages: int


def fresh_shape() -> FreshShape:
    """Best of seven on one H200 for 1 to 16 prompts: two such programs run on a multiprocessor."""
    if INTERPRETED:
        return FreshShape(16, 16, 4, 1)
    return FreshShape(64, 64, 4, 2)


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
def _visible(at, last, length, WINDOW: tl.constexpr):
    """Which of the keys ``at`` each row sees."""
    seen = (at[None, :] <= last[:, None]) & (at < length)[None, :]
    if WINDOW > 0:
        seen = seen & (last[:, None] - at[None, :] < WINDOW)
    return seen


@triton.jit
def _add_masked(acc, peak, norm, score, v, at, last, length, scale, soft_cap, WINDOW: tl.constexpr,
                CAPPED: tl.constexpr):  # fmt: skip
    """A tile of which a row may not see all."""
    p, acc, peak, norm = soften(
        acc, peak, norm, score, _visible(at, last, length, WINDOW), scale, soft_cap, CAPPED, True
    )
    # The rows behind a sequence are its neighbour's: zero times their infinity must not count.
    v = tl.where((at < length)[:, None], v, 0.0)
    return tl.dot(p.to(v.dtype), v, acc, out_dtype=tl.float32, input_precision="ieee"), peak, norm


@triton.jit
def _fresh(
    q_ptr, q_row, q_head, k_desc, v_desc, out_ptr, map_ptr, sinks_ptr, num_heads, scale, soft_cap,
    G: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
    CAPPED: tl.constexpr, SINKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    # The longest tiles of all heads go first.
    kv_heads = num_heads // G
    head = tl.program_id(0) % kv_heads
    turn = (tl.num_programs(0) - 1 - tl.program_id(0)) // kv_heads
    start, length, tile, _ = mapped_tile(map_ptr, turn)
    if length > 0:
        q, last, out, ok = query_rows(
            q_ptr, q_row, q_head, start, length, tile, head, num_heads, G, ROWS, D, D
        )
        n = tl.arange(0, TILE)
        column = head * D
        acc = tl.zeros([ROWS, D], tl.float32)
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        norm = tl.zeros([ROWS], tl.float32)
        scales = tl.full([ROWS], 1.0, tl.float32) * scale
        # [lo, full): every row sees every key; [full, hi): masks.
        first_pos = tile * ROWS // G
        lo = 0
        full = tl.minimum(first_pos + 1, length) // TILE * TILE
        hi = tl.minimum((tile * ROWS + ROWS - 1) // G, length - 1) + 1
        if WINDOW > 0:
            lo = tl.maximum(first_pos - WINDOW + 1, 0) // TILE * TILE
            full = lo
        score = scores(q, k_desc.load([start + lo, column]))
        if WINDOW == 0:
            for key in range(0, full, TILE):
                ahead = scores(q, k_desc.load([start + key + TILE, column]))
                p, acc, peak, norm = soften(acc, peak, norm, score, True, scales, soft_cap, CAPPED, False)
                v = v_desc.load([start + key, column])
                acc = tl.dot(p.to(q.dtype), v, acc, out_dtype=tl.float32, input_precision="ieee")
                score = ahead
        v = v_desc.load([start + full, column])
        acc, peak, norm = _add_masked(
            acc, peak, norm, score, v, full + n, last, length, scales, soft_cap, WINDOW, CAPPED
        )
        for key in range(full + TILE, hi, TILE):
            score = scores(q, k_desc.load([start + key, column]))
            v = v_desc.load([start + key, column])
            acc, peak, norm = _add_masked(
                acc, peak, norm, score, v, key + n, last, length, scales, soft_cap, WINDOW, CAPPED
            )
        acc = weigh(acc, peak, norm, tile, head, sinks_ptr, G, ROWS, SINKS)
        tl.store(out_ptr + out, acc.to(q.dtype), mask=ok)


def _specializes(q: Tensor, num_seqs: int) -> bool:
    """Whether warps are specialized: it pays for long prompts (of one H200's measurements, from 1,024 tokens on).

    How many of the sequences are there the host does not know in a captured step: the rest of them has no tokens.
    """
    long = q.shape[0] >= 2048 and q.shape[0] >= 256 * num_seqs
    return long and q.shape[2] == 128 and q.element_size() == 2 and supports_gluon(q.device)


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
    sinks: Tensor | None = None,
    skip_single: bool = False,
    plan: dict[object, Any] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attend each query of the sequences that have no earlier keys to their keys up to itself.

    Args:
        q: [T, Hq, D]; k, v: [T, Hkv, D], see fresh_covers.
        query_starts: int32 [S + 1].
        seq_lens: int32 [S], keys of each sequence.
        sinks: float32 [Hq], see kernels.attention.
        skip_single: leave sequences of one token alone.
        plan: of the batch, see tile_map.
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
    if window is None and soft_cap is None and sinks is None and _specializes(q, num_seqs):
        from headrace.kernels.attention.gluon_fresh import specialized_attention

        return specialized_attention(
            q, k, v, query_starts, seq_lens, scale=scale, skip_single=skip_single, plan=plan, out=out
        )
    shape = fresh_shape()
    described = [
        TensorDescriptor(x, [num_tokens, kv_heads * dim], [x.stride(0), 1], [shape.tile, dim]) for x in (k, v)
    ]
    tiles = tile_map(
        plan, query_starts, seq_lens, num_tokens, group, shape.rows, skip_single=skip_single, fresh=True
    )
    _fresh[(tiles.shape[0] * kv_heads,)](
        q, q.stride(0), q.stride(1), *described, out, tiles, q if sinks is None else sinks, num_heads, scale,
        soft_cap or 0.0,
        G=group, D=dim, ROWS=shape.rows, TILE=shape.tile, WINDOW=window or 0, CAPPED=soft_cap is not None,
        SINKS=sinks is not None,
        **launch_options(q.device, shape.warps, shape.stages),
    )  # fmt: skip
    return out
