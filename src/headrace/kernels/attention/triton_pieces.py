"""Parts of decode attention: pieces of sequences, tiles of keys, the new token's norm and rotation, the merging."""

from __future__ import annotations

import triton
import triton.language as tl

from headrace.kernels.attention.triton_fp4 import load_fp4

__all__ = ["add_sink", "add_tile", "load_blocks", "load_tile", "merge", "merge_few", "norm_rope", "pieces"]


@triton.jit
def norm_rope(x, other, gain, gain_other, cos, sin, D: tl.constexpr, R: tl.constexpr, eps, NORM: tl.constexpr,
               dtype: tl.constexpr):  # fmt: skip
    """x and ``other`` (x with the halves of its first R dimensions swapped), float32 [H, DP] -> rotated [H, DP]."""
    if NORM:
        rs = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        x = (x * rs * gain).to(dtype).to(tl.float32)
        if R > 0:
            other = (other * rs * gain_other).to(dtype).to(tl.float32)
    if R > 0:
        x = x * cos[None, :] + other * sin[None, :]
    return x.to(dtype)


@triton.jit
def load_blocks(table_ptr, key, hi, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Blocks of the keys [key, key + TILE), int32; 0 from ``hi`` on."""
    at = key + tl.arange(0, TILE)
    return tl.load(table_ptr + at.to(tl.uint32) // BLOCK, mask=at < hi, other=0)


@triton.jit
def load_tile(k_cache, v_cache, blocks, key, hi, cache_block, cache_token, head_offset, BLOCK: tl.constexpr,
               TILE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
               dtype: tl.constexpr):  # fmt: skip
    """Keys and values [TILE, DP] from ``key`` on; with MASKED zero from ``hi`` on. WIDE: 64-bit offsets.

    As the cache has them, or in ``dtype`` from an FP4 cache (bytes).
    """
    at = key + tl.arange(0, TILE)
    d = tl.arange(0, DP)[None, :]
    if WIDE:
        blocks = blocks.to(tl.int64)
    slot = blocks * cache_block + (at.to(tl.uint32) % BLOCK).to(tl.int32) * cache_token + head_offset
    at_k = k_cache + slot[:, None] + d
    at_v = v_cache + slot[:, None] + d
    if k_cache.dtype.element_ty == tl.uint8:
        there = at < hi
        k = load_fp4(k_cache, slot, there, TILE, D, DP, dtype)
        v = load_fp4(v_cache, slot, there, TILE, D, DP, dtype)
    elif MASKED:
        full = (at < hi)[:, None] & (d < D)
        k = tl.load(at_k, mask=full, other=0.0)
        v = tl.load(at_v, mask=full, other=0.0)
    elif D == DP:
        k = tl.load(at_k)
        v = tl.load(at_v)
    else:
        k = tl.load(at_k, mask=d < D, other=0.0)
        v = tl.load(at_v, mask=d < D, other=0.0)
    return k, v


@triton.jit
def add_tile(acc, peak, norm, q, k, v, left, scale, soft_cap, CAPPED: tl.constexpr, MASKED: tl.constexpr):
    """One step of the online softmax, in powers of 2; with MASKED only the first ``left`` keys count."""
    dtype: tl.constexpr = q.dtype
    score = tl.dot(q, tl.trans(k.to(dtype)), out_dtype=tl.float32, input_precision="ieee")
    factor = scale * 1.4426950408889634
    if CAPPED:
        score = soft_cap * (2.0 * tl.sigmoid(2.0 * score * scale / soft_cap) - 1.0)
        factor = 1.4426950408889634
    if MASKED:
        score = tl.where((tl.arange(0, k.shape[0]) < left)[None, :], score, float("-inf"))
    top = tl.maximum(peak, tl.max(score, 1) * factor)
    safe = top
    if MASKED:
        safe = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp2(score * factor - safe[:, None])
    alpha = tl.exp2(peak - safe)
    norm = norm * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    acc = tl.dot(p.to(dtype), v.to(dtype), acc, out_dtype=tl.float32, input_precision="ieee")
    return acc, top, norm


@triton.jit
def add_sink(norm, peak, sinks_ptr, heads, ok):
    """Denominators [N] of softmaxes whose maxima are ``peak``, in powers of 2, with the sinks of ``heads`` [N].

    Right for any sink: where it is far above the keys, the denominator is infinite and they count nothing.
    """
    sink = tl.load(sinks_ptr + heads, mask=ok, other=float("-inf")).to(tl.float32)
    return norm + tl.exp2(sink * 1.4426950408889634 - peak)


@triton.jit
def pieces(length, WINDOW: tl.constexpr, MAX_SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr):
    """(first piece, number of pieces, keys a piece) of sequences of ``length`` keys.

    A piece has MIN_SPLIT keys, doubled until MAX_SPLITS of them suffice; those before the window are left out.
    """
    size = length * 0 + MIN_SPLIT
    span = length
    MOST: tl.constexpr = (
        MAX_SPLITS if WINDOW == 0 else MAX_SPLITS - 2
    )  # a window may begin and end inside a piece
    if WINDOW > 0:
        span = tl.minimum(length, WINDOW)
    for _ in tl.static_range(14):
        size = tl.where(span > size * MOST, size * 2, size)
    first = length * 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0) // size
    return first, (length + size - 1) // size - first, size


@triton.jit
def merge(
    partial_ptr,
    base,
    count,
    head,
    num_heads,
    sinks_ptr,
    G: tl.constexpr,
    GM: tl.constexpr,
    DP: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Sum of ``count`` pieces of G heads, normalized: float32 [GM, DP]."""
    W: tl.constexpr = DP + 4
    g = tl.arange(0, GM)
    i = tl.arange(0, MAX_SPLITS)
    d = tl.arange(0, DP)
    c = tl.arange(0, CHUNK)
    rows = base + (i[:, None] * num_heads + head + g[None, :]) * W
    live = (i[:, None] < count) & (g[None, :] < G)
    top = tl.load(partial_ptr + rows + DP, mask=live, other=float("-inf"), cache_modifier=".cg")
    norm = tl.load(partial_ptr + rows + DP + 1, mask=live, other=0.0, cache_modifier=".cg")
    peak = tl.max(top, 0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp2(top - peak[None, :])
    total = tl.sum(norm * weight, 0)
    if SINKS:
        total = add_sink(total, peak, sinks_ptr, head + g, g < G)
    acc = tl.zeros([GM, DP], tl.float32)
    # Parts are far away: several loads are on their way at any time. They must be of 16 bytes, or the copies would go
    # through L1, which does not see what others write; so a chunk's weights are picked out of the registers.
    for start in tl.range(0, count, CHUNK, num_stages=STAGES):
        at = base + ((start + c)[:, None] * num_heads + head + g[None, :]) * W
        ok = ((start + c)[:, None] < count) & (g[None, :] < G)
        part = tl.load(
            partial_ptr + at[:, :, None] + d[None, None, :],
            mask=ok[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        mine = i[None, :, None] == (start + c)[:, None, None]
        mine = tl.sum(tl.where(mine, weight[None, :, :], 0.0), 1)
        acc += tl.sum(part * mine[:, :, None], 0)
    return acc / tl.where(total > 0.0, total, 1.0)[:, None]


@triton.jit
def merge_few(
    partial_ptr,
    base,
    count,
    head,
    num_heads,
    sinks_ptr,
    G: tl.constexpr,
    GM: tl.constexpr,
    DP: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    SINKS: tl.constexpr,
):
    """As merge, for programs of several warps over few pieces: without copies through shared memory."""
    W: tl.constexpr = DP + 4
    g = tl.arange(0, GM)
    i = tl.arange(0, MAX_SPLITS)
    d = tl.arange(0, DP)
    c = tl.arange(0, CHUNK)
    # Everything that does not depend on the maximum is asked for first.
    at = base + (c[:, None] * num_heads + head + g[None, :]) * W
    ok = (c[:, None] < count) & (g[None, :] < G)
    m = tl.load(partial_ptr + at + DP, mask=ok, other=float("-inf"), cache_modifier=".cg")
    part = tl.load(
        partial_ptr + at[:, :, None] + d[None, None, :], mask=ok[:, :, None], other=0.0, cache_modifier=".cg"
    )
    rows = base + (i[:, None] * num_heads + head + g[None, :]) * W
    live = (i[:, None] < count) & (g[None, :] < G)
    top = tl.load(partial_ptr + rows + DP, mask=live, other=float("-inf"), cache_modifier=".cg")
    peak = tl.max(top, 0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    norm = tl.load(partial_ptr + rows + DP + 1, mask=live, other=0.0, cache_modifier=".cg")
    total = tl.sum(norm * tl.exp2(top - peak[None, :]), 0)
    if SINKS:
        total = add_sink(total, peak, sinks_ptr, head + g, g < G)
    acc = tl.sum(part * tl.exp2(m - peak[None, :])[:, :, None], 0)
    for start in range(CHUNK, count, CHUNK):
        at = base + ((start + c)[:, None] * num_heads + head + g[None, :]) * W
        ok = ((start + c)[:, None] < count) & (g[None, :] < G)
        m = tl.load(partial_ptr + at + DP, mask=ok, other=float("-inf"), cache_modifier=".cg")
        part = tl.load(
            partial_ptr + at[:, :, None] + d[None, None, :],
            mask=ok[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        acc += tl.sum(part * tl.exp2(m - peak[None, :])[:, :, None], 0)
    return acc / tl.where(total > 0.0, total, 1.0)[:, None]
