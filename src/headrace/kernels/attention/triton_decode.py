"""Paged decode attention: one new token a sequence, its keys split over programs (Flash-Decoding, Dao et al. 2023).

A sequence's keys are cut into at most ``MAX_SPLITS`` pieces whose size follows from its own length alone, so a
row's result does not depend on its neighbours. Programs are persistent: each takes pieces (sequence, key head,
split) in turn, and finds them from the lengths on the device, so that one launch, and one CUDA graph, serves any
lengths. The last program to finish a (sequence, key head) merges its pieces in order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.kernels.attention.decode_shapes import DecodeShape, decode_shape
from headrace.kernels.attention.fp4 import FP4
from headrace.kernels.attention.triton_fp4 import round_fp4, store_fp4
from headrace.kernels.attention.triton_pieces import (
    add_sink,
    add_tile,
    load_blocks,
    load_tile,
    merge,
    merge_few,
    norm_rope,
    pieces,
)
from headrace.kernels.attention.triton_words import (
    round_fp8,
    split_columns,
    store_words,
    to_half_range,
    turned,
)
from headrace.kernels.launch import INTERPRETED, launch_options, num_multiprocessors, sequence_lanes

__all__ = [
    "MAX_SPLITS",
    "DecodeWorkspace",
    "QKNormRope",
    "decode_attention",
    "padded_dim",
]

MAX_SPLITS = 32


def padded_dim(head_dim: int) -> int:
    """Columns of a tile: a power of two, and no fewer than a product's inner dimension takes."""
    return max(16, int(triton.next_power_of_2(head_dim)))


@dataclass(slots=True)
class DecodeWorkspace:
    """Scratch of decode attention for up to S sequences, shared by all layers.

    Attributes:
        partial: float32 [S, MAX_SPLITS, Hq, Dp + 4], unnormalized sums, then maximum, denominator and nothing, so that
            rows are whole 16 bytes.
        arrivals: int32 [S * Hkv], zero between launches.
    """

    partial: Tensor
    arrivals: Tensor

    @staticmethod
    def allocate(
        num_seqs: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
    ) -> DecodeWorkspace:
        width = padded_dim(head_dim) + 4
        partial = torch.empty(num_seqs, MAX_SPLITS, num_heads, width, dtype=torch.float32, device=device)
        return DecodeWorkspace(
            partial, torch.zeros(num_seqs * num_kv_heads, dtype=torch.int32, device=device)
        )


@dataclass(slots=True)
class QKNormRope:
    """What turns a raw projection into queries, keys and cache entries inside the attention kernel.

    Attributes:
        weight: [Hq + Hkv, D] gains of the norm over each head, one for all query heads and one for all key
            heads; or None.
        cos, sin: float32 [L, R] by position; R rotated dimensions, sin negated in its first half; or None.
    """

    weight: Tensor | None
    eps: float
    cos: Tensor | None
    sin: Tensor | None


@triton.jit(do_not_specialize=["num_seqs"])
def _decode(
    q_ptr, q_row, q_head, k_ptr, v_ptr, kv_row, kv_head, out_ptr,
    k_cache, v_cache, cache_block, cache_token, cache_head,
    partial_ptr, arrivals_ptr, tables_ptr, table_row, rows_ptr, starts_ptr, lens_ptr,
    gain_ptr, eps, cos_ptr, sin_ptr, sinks_ptr, num_seqs, num_kv_heads, scale, soft_cap,
    G: tl.constexpr, GP: tl.constexpr, GM: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, SEQS: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    FUSED: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, STARTS: tl.constexpr, WIDE: tl.constexpr,
    MAX_SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr, CHUNK: tl.constexpr, FEW: tl.constexpr, SINKS: tl.constexpr,
    PARTS: tl.constexpr, PLAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # Lengths, tables and older keys are written by no kernel that may still run (kernels/step), so a fused step
    # reads them before it waits for the projection. A program without work leaves at once, to make room for the
    # next kernel; one that has work always waits.
    if PDL:
        gdc_launch_dependents()
        if not FUSED:
            gdc_wait()  # the new keys are the work of the kernel before
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    num_heads = num_kv_heads * G
    seqs = tl.arange(0, SEQS)
    counts = _count_pieces(lens_ptr, starts_ptr, seqs, num_seqs, WINDOW, STARTS, MAX_SPLITS, MIN_SPLIT)
    ends = tl.cumsum(counts, 0)
    LOWERED: tl.constexpr = 65536.0 if PARTS == 4 and not PLAIN else 1.0  # see widen_fp4
    for work in range(tl.program_id(0), tl.max(ends, 0) * num_kv_heads, tl.num_programs(0)):
        head = work % num_kv_heads
        seq, length, place, count, lo, hi = _find_piece(work // num_kv_heads, ends, counts, seqs, lens_ptr, WINDOW,
                                                        MAX_SPLITS, MIN_SPLIT)  # fmt: skip
        token = seq
        if STARTS:
            token = tl.load(starts_ptr + seq)
        token = token.to(tl.int64)
        table = seq
        if ROWS:
            table = tl.load(rows_ptr + seq)
        table_ptr = tables_ptr + table.to(tl.int64) * table_row
        newest = hi == length
        if FUSED:
            hi = tl.minimum(hi, length - 1)
        # The last tile, which may not be full, goes first: the others need no masks.
        tail = lo + tl.maximum(hi - lo - 1, 0) // TILE * TILE
        blocks = load_blocks(table_ptr, tail, hi, BLOCK, TILE)
        k, v = load_tile(k_cache, v_cache, blocks, tail, hi, cache_block, cache_token, head * cache_head, BLOCK,
                         TILE, D, DP, PARTS, WIDE, True, dtype)  # fmt: skip
        # Blocks are always read one tile ahead: were they read with their keys, the software pipeline would have
        # to empty itself for each tile.
        blocks = load_blocks(table_ptr, lo, tail, BLOCK, TILE)
        heads = tl.minimum(head * G + tl.arange(0, GM), num_heads - 1)
        kv_at = token * kv_row + head * kv_head
        q, sums, peak, norm, factor = _begin(
            q_ptr + token * q_row + heads[:, None] * q_head, k_ptr + kv_at, v_ptr + kv_at, k_cache, v_cache, table_ptr,
            length - 1, newest, head, cache_block, cache_token, cache_head, num_heads, gain_ptr, eps, cos_ptr, sin_ptr,
            scale, soft_cap, LOWERED, G, GP, GM, D, DP, R, BLOCK, TILE, CAPPED, FUSED, NORM, PARTS, PDL)  # fmt: skip
        sums, peak, norm = add_tile(sums, peak, norm, q, k, v, hi - tail, factor, soft_cap, TILE, DP, PARTS, PLAIN,
                                    CAPPED, True)  # fmt: skip
        for key in range(lo, tail, TILE):
            following = load_blocks(table_ptr, key + TILE, tail, BLOCK, TILE)
            k, v = load_tile(k_cache, v_cache, blocks, key, hi, cache_block, cache_token, head * cache_head, BLOCK,
                             TILE, D, DP, PARTS, WIDE, False, dtype)  # fmt: skip
            blocks = following
            sums, peak, norm = add_tile(sums, peak, norm, q, k, v, TILE, factor, soft_cap, TILE, DP, PARTS, PLAIN,
                                        CAPPED, False)  # fmt: skip
        _end(turned(sums, PARTS), peak, tl.sum(norm, 0), out_ptr + token * num_heads * D, partial_ptr, arrivals_ptr,
             sinks_ptr, seq, head, place, count, num_kv_heads, LOWERED, G, GP, GM, D, DP, PARTS, MAX_SPLITS, CHUNK,
             FEW, SINKS)  # fmt: skip


@triton.jit
def _count_pieces(lens_ptr, starts_ptr, seqs, num_seqs, WINDOW: tl.constexpr, STARTS: tl.constexpr,
                  MAX_SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr):  # fmt: skip
    """Pieces of each of the sequences ``seqs``; none of those behind the last, or with other than one new token."""
    lens = tl.load(lens_ptr + seqs, mask=seqs < num_seqs, other=0)
    _, counts, _ = pieces(lens, WINDOW, MAX_SPLITS, MIN_SPLIT)
    if STARTS:
        starts = tl.load(starts_ptr + seqs, mask=seqs < num_seqs, other=0)
        ends = tl.load(starts_ptr + seqs + 1, mask=seqs < num_seqs, other=0)
        counts = tl.where(ends - starts == 1, counts, 0)
    return counts


@triton.jit
def _find_piece(piece, ends, counts, seqs, lens_ptr, WINDOW: tl.constexpr, MAX_SPLITS: tl.constexpr,
                MIN_SPLIT: tl.constexpr):  # fmt: skip
    """(sequence, its keys, the piece's place in it, of how many, its first key, the one behind its last)."""
    seq = tl.sum((ends <= piece).to(tl.int32), 0)
    length = tl.load(lens_ptr + seq)
    first, count, size = pieces(length, WINDOW, MAX_SPLITS, MIN_SPLIT)
    place = piece - tl.sum(tl.where(seqs < seq, counts, 0), 0)
    lo = (first + place) * size
    hi = tl.minimum(lo + size, length)
    if WINDOW > 0:
        lo = tl.maximum(lo, length - WINDOW)
    return seq, length, place, count, lo, hi


@triton.jit
def _begin(
    q_at, k_ptr, v_ptr, k_cache, v_cache, table_ptr, pos, newest, head, cache_block, cache_token, cache_head,
    num_heads, gain_ptr, eps, cos_ptr, sin_ptr, scale, soft_cap,
    LOWERED: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, GM: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, CAPPED: tl.constexpr, FUSED: tl.constexpr,
    NORM: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Queries and, as add_tile has them, sums, maxima and denominators of the new token alone, and factors of scores.

    The fused step waits for the kernel before. The new key and value never leave registers: they open the sums of the
    piece that they end; those of other pieces are empty.
    """
    d = tl.arange(0, DP)
    q_ok = (tl.arange(0, GM)[:, None] < G) & (d[None, :] < D)
    peak = tl.full([GP], float("-inf"), tl.float32)
    norm = tl.zeros([TILE, GP], tl.float32)
    acc = tl.zeros([GP, DP], tl.float32)
    if FUSED:
        q, new_k, new_v = _take_new(
            q_at, q_ok, k_ptr, v_ptr, k_cache, v_cache, table_ptr, pos, newest, head, cache_block, cache_token,
            cache_head, num_heads, gain_ptr, eps, cos_ptr, sin_ptr, G, D, DP, R, BLOCK, NORM, PARTS, PDL)  # fmt: skip
        score = tl.sum(q.to(tl.float32) * new_k.to(tl.float32), 1) * scale
        if CAPPED:
            score = soft_cap * (2.0 * tl.sigmoid(2.0 * score / soft_cap) - 1.0)
        score = tl.where(newest, score * 1.4426950408889634, float("-inf"))
        peak = tl.broadcast_to(score[None, :], (GP // GM, GM)).reshape(GP)
        norm += tl.where(newest & (tl.arange(0, TILE) == 0), 1.0, 0.0)[:, None]
        acc += new_v.to(tl.float32)
    else:
        q = tl.load(q_at + d[None, :], mask=q_ok, other=0.0)
    factor = tl.full([GM], 1.0, tl.float32) * scale
    if PARTS == 2 and q.dtype != tl.float32:
        q, power = to_half_range(q)
        factor = factor * power
    # Heads are repeated until they are as many as a product takes.
    q = tl.broadcast_to(q[None, :, :], (GP // GM, GM, DP)).reshape(GP, DP)
    factor = tl.broadcast_to(factor[None, :], (GP // GM, GM)).reshape(GP) * LOWERED
    q_parts = turned(split_columns(q, GP, DP, PARTS), PARTS)
    sums = turned(split_columns(acc / LOWERED, GP, DP, PARTS), PARTS)
    return q_parts, sums, peak, norm, factor


@triton.jit
def _gains(gain_ptr, d, swap, D: tl.constexpr):
    """A head's gains, float32 [1, DP], and those of the dimensions ``swap``."""
    gain = tl.load(gain_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    other = tl.load(gain_ptr + swap, mask=d < D, other=0.0).to(tl.float32)[None, :]
    return gain, other


@triton.jit
def _take_new(
    q_at, q_ok, k_ptr, v_ptr, k_cache, v_cache, table_ptr, pos, newest, head,
    cache_block, cache_token, cache_head, num_heads, gain_ptr, eps, cos_ptr, sin_ptr,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
    PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Norm and rotation of the queries and the new key at ``pos``, which goes to the cache with its value.

    Unless this is the ``newest`` piece, key and value are zeros, and nothing is written.

    Returns:
        Queries [GM, DP], the key and the value [1, DP] as the cache has them.
    """
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    d = tl.arange(0, DP)
    half: tl.constexpr = R // 2
    swap = tl.where(d < half, d + half, tl.where(d < R, d - half, d))
    one = tl.arange(0, 1)[:, None]
    k_ok = newest & (one == 0) & (d[None, :] < D)
    cos = tl.full([DP], 1.0, tl.float32)
    sin = tl.zeros([DP], tl.float32)
    if R > 0:
        cos = tl.load(cos_ptr + pos.to(tl.int64) * R + d, mask=d < R, other=1.0)
        sin = tl.load(sin_ptr + pos.to(tl.int64) * R + d, mask=d < R, other=0.0)
    gain = tl.full([1, DP], 1.0, tl.float32)
    gain_other = gain
    gain_k = gain
    gain_k_other = gain
    if NORM:  # one gain for all query heads, one for all key heads (HeadNorm)
        gain, gain_other = _gains(gain_ptr + (head * G) * D, d, swap, D)
        gain_k, gain_k_other = _gains(gain_ptr + (num_heads + head) * D, d, swap, D)
    block = tl.load(table_ptr + pos // BLOCK).to(tl.int64)
    if PDL:
        gdc_wait()
    q = tl.load(q_at + d[None, :], mask=q_ok, other=0.0)
    new_k = tl.load(k_ptr + one + d[None, :], mask=k_ok, other=0.0).to(tl.float32)
    new_v = tl.load(v_ptr + one + d[None, :], mask=k_ok, other=0.0)
    other = q.to(tl.float32)
    other_k = new_k
    if R > 0:
        other = tl.load(q_at + swap[None, :], mask=q_ok, other=0.0).to(tl.float32)
        other_k = tl.load(k_ptr + one + swap[None, :], mask=k_ok, other=0.0).to(tl.float32)
    q = norm_rope(q.to(tl.float32), other, gain, gain_other, cos, sin, D, R, eps, NORM, dtype)
    new_k = norm_rope(new_k, other_k, gain_k, gain_k_other, cos, sin, D, R, eps, NORM, dtype)
    slot = block * cache_block + (pos % BLOCK) * cache_token + head * cache_head
    if k_cache.dtype.element_ty == tl.uint8:
        only = newest & (tl.arange(0, 1) == 0)
        codes, scales, new_k = round_fp4(new_k.to(tl.float32), 1, DP)
        store_fp4(k_cache, slot + tl.arange(0, 1), codes, scales, only, D, DP)
        codes, scales, new_v = round_fp4(new_v.to(tl.float32), 1, DP)
        store_fp4(v_cache, slot + tl.arange(0, 1), codes, scales, only, D, DP)
    elif PARTS > 1:
        new_k = store_words(k_cache + slot, new_k, newest, D, DP, PARTS)
        new_v = store_words(v_cache + slot, new_v, newest, D, DP, PARTS)
    else:
        if k_cache.dtype.element_ty == tl.float8e4nv:
            new_k = round_fp8(new_k.to(tl.float32))
            new_v = round_fp8(new_v.to(tl.float32))
        else:
            new_k = new_k.to(k_cache.dtype.element_ty)
            new_v = new_v.to(v_cache.dtype.element_ty)
        tl.store(k_cache + slot + one + d[None, :], new_k.to(k_cache.dtype.element_ty), mask=k_ok)
        tl.store(v_cache + slot + one + d[None, :], new_v.to(v_cache.dtype.element_ty), mask=k_ok)
    return q, new_k, new_v


@triton.jit
def _end(
    sums, peak, norm, out_ptr, partial_ptr, arrivals_ptr, sinks_ptr, seq, head, place, count, num_kv_heads,
    LOWERED: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, GM: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    PARTS: tl.constexpr, MAX_SPLITS: tl.constexpr, CHUNK: tl.constexpr, FEW: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Write the output of a sequence of one piece; of several, the piece's sums.

    ``sums`` is a tuple of PARTS tiles [GP, DP / PARTS]: column j of tile i is dimension PARTS j + i.
    """
    if count == 1:
        g, c = tl.arange(0, GP), tl.arange(0, DP // PARTS)[None, :]
        if SINKS:
            norm = add_sink(norm, peak, sinks_ptr, head * G + g, g < G)
        for i in tl.static_range(PARTS):
            o = (sums[i] * LOWERED / norm[:, None]).to(out_ptr.dtype.element_ty)
            o_ok = (g[:, None] < G) & (c * PARTS + i < D)
            tl.store(out_ptr + (head * G + g)[:, None] * D + c * PARTS + i, o, mask=o_ok)
    else:
        _add_piece(sums, peak, norm, out_ptr, partial_ptr, arrivals_ptr, sinks_ptr, seq, head, place, count,
                   num_kv_heads, LOWERED, G, GP, GM, D, DP, PARTS, MAX_SPLITS, CHUNK, FEW, SINKS)  # fmt: skip


@triton.jit
def _add_piece(
    sums, peak, norm, out_ptr, partial_ptr, arrivals_ptr, sinks_ptr, seq, head, place, count, num_kv_heads,
    LOWERED: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, GM: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    PARTS: tl.constexpr, MAX_SPLITS: tl.constexpr, CHUNK: tl.constexpr, FEW: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Leave the sums of piece ``place`` of ``count`` in memory; who comes last adds all of them and writes the output.

    ``sums`` is a tuple of PARTS tiles [GP, DP / PARTS].
    """
    W: tl.constexpr = DP + 4
    num_heads = num_kv_heads * G
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    row = seq.to(tl.int64) * (MAX_SPLITS * num_heads * W)
    mine = partial_ptr + row + (place * num_heads + head * G + g) * W
    c = tl.arange(0, DP // PARTS)[None, :]
    for i in tl.static_range(PARTS):
        tl.store(mine[:, None] + i * (DP // PARTS) + c, sums[i] * LOWERED, mask=(g[:, None] < G) & (c < DP))
    tl.store(mine + DP, peak, mask=g < G)
    tl.store(mine + DP + 1, norm, mask=g < G)
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals_ptr + seq * num_kv_heads + head, 1, sem="acq_rel", scope="gpu")
    if arrived == count - 1:
        tl.debug_barrier()
        if FEW:
            o = merge_few(partial_ptr, row, count, head * G, num_heads, sinks_ptr, G, GM, DP, MAX_SPLITS, CHUNK,
                          SINKS)  # fmt: skip
        else:
            o = merge(partial_ptr, row, count, head * G, num_heads, sinks_ptr, G, GM, DP, MAX_SPLITS, CHUNK, 4,
                      SINKS)  # fmt: skip
        gm = tl.arange(0, GM)
        column = (d % (DP // PARTS) * PARTS + d // (DP // PARTS))[None, :]
        o_ok = (gm[:, None] < G) & (column < D)
        o_at = out_ptr + (head * G + gm)[:, None] * D + column
        tl.store(o_at, o.to(out_ptr.dtype.element_ty), mask=o_ok)
        tl.store(arrivals_ptr + seq * num_kv_heads + head, 0)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor,
    seq_lens: Tensor,
    workspace: DecodeWorkspace,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    query_starts: Tensor | None = None,
    rows: Tensor | None = None,
    new_k: Tensor | None = None,
    new_v: Tensor | None = None,
    fused: QKNormRope | None = None,
    long: bool = False,
    beside: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Attend the one new token of each sequence to its cached keys.

    Args:
        q: [T, Hq, D], last dimension contiguous.
        k_cache, v_cache: [num_blocks, block_size, Hkv, D], equal strides; of an FP4 cache the last is fp4.row_bytes(D).
        tables: int32 [*, B]; sequence s uses row ``rows[s]`` if rows is given, else row s.
        seq_lens: int32 [S]; 0: no sequence.
        workspace: of at least S sequences.
        sinks: float32 [Hq], see kernels.attention.
        query_starts: int32 [S + 1]; sequences with other than one new token are skipped. None: token s is s's.
        new_k, new_v: [T, Hkv, D], raw; with ``fused``: norm and rotation are applied to q and new_k, and new_k
            and new_v are written to the cache, here.
        long: cut for long sequences (see is_long).
        beside: another kernel runs at the same time, and needs room.
        out: [T, Hq, D] contiguous.

    Returns:
        out.
    """
    kind = k_cache.dtype
    num_heads, head_dim = q.shape[1:]
    block_size, num_kv_heads = k_cache.shape[1:3]
    num_seqs = seq_lens.shape[0]
    group = num_heads // num_kv_heads
    padded = padded_dim(head_dim)
    merged = triton.next_power_of_2(group)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    assert k_cache.stride() == v_cache.stride() and k_cache.stride(3) == 1 and q.stride(2) == 1
    assert workspace.partial.shape[0] >= num_seqs and workspace.partial.shape[2] == num_heads
    gains, cos, sin, eps = None, None, None, 0.0
    if fused is not None:
        gains, cos, sin, eps = fused.weight, fused.cos, fused.sin, fused.eps
        assert new_k is not None and new_v is not None and new_k.stride() == new_v.stride()
    shape = _shape(num_seqs * num_kv_heads, padded, long, kind)
    parts = _parts(kind, head_dim, shape)
    if parts > 1 or kind is FP4:
        k_cache, v_cache = (
            cache.view(torch.int16 if parts > 1 else torch.uint8) for cache in (k_cache, v_cache)
        )
    if beside:
        shape = shape._replace(programs=max(1, shape.programs // 2), early=False)
    most = num_seqs * num_kv_heads * shape.splits
    programs = min(most, num_multiprocessors(q.device) * shape.programs)
    options = launch_options(q.device, shape.warps, shape.stages)
    if shape.registers is not None:
        options["maxnreg"] = shape.registers
    if not shape.early:
        options.pop("launch_pdl", None)
    _decode[(programs,)](
        q, q.stride(0), q.stride(1),
        new_k if new_k is not None else q, new_v if new_v is not None else q,
        new_k.stride(0) if new_k is not None else 0, new_k.stride(1) if new_k is not None else 0, out,
        k_cache, v_cache, k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        workspace.partial, workspace.arrivals, tables, tables.stride(0), seq_lens if rows is None else rows,
        seq_lens if query_starts is None else query_starts, seq_lens,
        q if gains is None else gains, eps, workspace.partial if cos is None else cos,
        workspace.partial if sin is None else sin, q if sinks is None else sinks,
        num_seqs, num_kv_heads, scale, soft_cap or 0.0,
        G=group, GP=max(8, merged), GM=merged, D=head_dim, DP=padded, R=0 if cos is None else cos.shape[-1],
        BLOCK=block_size, TILE=shape.tile, SEQS=sequence_lanes(num_seqs), WINDOW=window or 0,
        CAPPED=soft_cap is not None, FUSED=fused is not None, NORM=gains is not None, ROWS=rows is not None,
        STARTS=query_starts is not None, WIDE=k_cache.numel() >= 2**31, MAX_SPLITS=shape.splits,
        MIN_SPLIT=shape.min_split,
        CHUNK=max(1, min(8 if shape.warps > 1 else shape.splits, 2048 // (merged * padded))), FEW=shape.warps > 1,
        SINKS=sinks is not None, PARTS=parts, PLAIN=INTERPRETED or (parts == 4 and q.dtype is not torch.bfloat16),
        **options,
    )  # fmt: skip
    return out


def _parts(cache: torch.dtype, dim: int, shape: DecodeShape) -> int:
    """Numbers of a word that the cache is read by; a product takes 16 of each part."""
    parts = 4 if cache is FP4 else 2 if cache is torch.float8_e4m3fn else 1
    if parts == 4 and shape.warps > 1 and dim <= 128 and not INTERPRETED:  # bytes are faster there
        return 1
    return parts if dim % (8 * parts) == 0 and padded_dim(dim) >= 16 * parts else 1


def _shape(num_heads: int, padded: int, long: bool, cache: torch.dtype) -> DecodeShape:
    if INTERPRETED:
        return DecodeShape(16, 16, 2, 4, 1)
    shape = decode_shape(num_heads, padded, long)
    if cache.itemsize == 1 and shape.warps == 1:  # as many bytes a tile
        shape = shape._replace(tile=2 * shape.tile)
    if (
        cache is FP4
    ):  # larger tiles take too many registers for decoding, smaller ones give wrong products (0071)
        shape = shape._replace(tile=32)
    return shape
