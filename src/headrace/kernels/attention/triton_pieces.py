"""Parts of decode attention: pieces of sequences, tiles of keys, the new token's norm and rotation, the merging."""

from __future__ import annotations

import triton
import triton.language as tl

from headrace.kernels.attention.triton_fp4 import load_fp4
from headrace.kernels.attention.triton_words import widen_fp4, widen_fp8

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
def _load_rows(
    base, slots, there, D: tl.constexpr, DP: tl.constexpr, TURNED: tl.constexpr, MASKED: tl.constexpr
):
    """[TILE, DP] at ``slots``, or [DP, TILE]; with MASKED zero where not ``there``."""
    KEYS: tl.constexpr = 0 if TURNED else 1  # the axis that keys do not have
    d = tl.expand_dims(tl.arange(0, DP), 1 - KEYS)
    at = base + tl.expand_dims(slots, KEYS) + d
    if MASKED:
        rows = tl.load(at, mask=tl.expand_dims(there, KEYS) & (d < D), other=0.0)
    elif D == DP:
        rows = tl.load(at)
    else:
        rows = tl.load(at, mask=d < D, other=0.0)
    return rows


@triton.jit
def _load_half(base, slots, there, TILE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PARTS: tl.constexpr,
               TURNED: tl.constexpr, MASKED: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """Keys of a tile, or with TURNED its values."""
    if base.dtype.element_ty == tl.uint8:
        rows = load_fp4(base, slots, there, TILE, D, DP, dtype)
        if TURNED:
            rows = tl.trans(rows)
        found = (rows,)
    elif PARTS == 4:
        # Rows begin at multiples of their size: said so, as much as that allows is loaded at once.
        WIDTH: tl.constexpr = D // 4 + D // 32
        ALIGNED: tl.constexpr = 8 if WIDTH % 8 == 0 else 4 if WIDTH % 4 == 0 else 2 if WIDTH % 2 == 0 else 1
        slots = slots // ALIGNED * ALIGNED
        words = _load_rows(base, slots, there, D // 4, DP // 4, TURNED, MASKED)
        scales = _load_rows(base + D // 4, slots, there, D // 32, DP // 32, TURNED, MASKED)
        found = (words, scales)  # type: ignore[assignment]
    else:
        found = (_load_rows(base, slots, there, D // PARTS, DP // PARTS, TURNED, MASKED),)
    return found


@triton.jit
def load_tile(k_cache, v_cache, blocks, key, hi, cache_block, cache_token, head_offset, BLOCK: tl.constexpr,
              TILE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr,
              MASKED: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """Keys and values from ``key`` on; with MASKED zero from ``hi`` on. WIDE: 64-bit offsets.

    Keys are a tuple: [TILE, DP] as the cache has them (or in ``dtype`` from an FP4 cache of bytes), words
    [TILE, DP / 2] of an FP8 cache, or words [TILE, DP / 4] of an FP4 cache and those of their scales, [TILE, DP / 32].
    Values are the same transposed: a product's operand is loaded as it will be read, or its loads are not taken ahead
    of the loop.
    """
    at = key + tl.arange(0, TILE)
    there = at < hi
    if WIDE:
        blocks = blocks.to(tl.int64)
    slots = blocks * cache_block + (at.to(tl.uint32) % BLOCK).to(tl.int32) * cache_token + head_offset
    k = _load_half(k_cache, slots, there, TILE, D, DP, PARTS, False, MASKED, dtype)
    v = _load_half(v_cache, slots, there, TILE, D, DP, PARTS, True, MASKED, dtype)
    return k, v


@triton.jit
def _widened(tile, TILE: tl.constexpr, DP: tl.constexpr, PARTS: tl.constexpr, PLAIN: tl.constexpr,
             TURNED: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """A tuple of PARTS tiles of keys [TILE, DP / PARTS], or with TURNED of values [DP / PARTS, TILE], of ``dtype``."""
    if PARTS == 1:
        parts = (tile[0].to(dtype),)
    elif PARTS == 2:
        parts = widen_fp8(tile[0], dtype, PLAIN)
    else:
        parts = widen_fp4(tile[0], tile[1], TILE, DP // 4, dtype, PLAIN, TURNED)
    return parts


@triton.jit
def add_tile(acc, peak, norm, q, k, v, left, factor, soft_cap, TILE: tl.constexpr, DP: tl.constexpr,
             PARTS: tl.constexpr, PLAIN: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """One step of the online softmax, in powers of 2; with MASKED only the first ``left`` keys count.

    Keys and dimensions are the wide side of the products, heads the narrow one. ``q`` and ``acc`` are tuples of PARTS
    tiles [DP / PARTS, H], k and v as load_tile has them; ``norm`` [TILE, H] is summed over keys by the caller, once;
    ``factor`` float32 [H] is that of each head's scores.
    """
    dtype: tl.constexpr = q[0].dtype
    keys = _widened(k, TILE, DP, PARTS, PLAIN, False, dtype)
    score = tl.dot(keys[0], q[0], out_dtype=tl.float32, input_precision="ieee")
    for i in tl.static_range(1, PARTS):
        score = tl.dot(keys[i], q[i], score, out_dtype=tl.float32, input_precision="ieee")
    if CAPPED:
        score = soft_cap * (2.0 * tl.sigmoid(2.0 * score * factor[None, :] / soft_cap) - 1.0)
        factor = factor * 0.0 + 1.0
    factor = factor * 1.4426950408889634
    if MASKED:
        score = tl.where((tl.arange(0, TILE) < left)[:, None], score, float("-inf"))
    top = tl.maximum(peak, tl.max(score, 0) * factor)
    safe = top
    if MASKED:
        safe = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp2(score * factor[None, :] - safe[None, :])
    alpha = tl.exp2(peak - safe)
    norm = norm * alpha[None, :] + p
    p = p.to(dtype)
    values = _widened(v, TILE, DP, PARTS, PLAIN, True, dtype)
    sums = ()
    for i in tl.static_range(PARTS):
        scaled = acc[i] * alpha[None, :]
        total = tl.dot(values[i], p, scaled, out_dtype=tl.float32, input_precision="ieee")
        sums = sums + (total,)  # type: ignore[assignment]  # noqa: RUF005  (Triton 3.6 knows no star)
    return sums, top, norm


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
    span = length
    MOST: tl.constexpr = (
        MAX_SPLITS if WINDOW == 0 else MAX_SPLITS - 2
    )  # a window may begin and end inside a piece
    if WINDOW > 0:
        span = tl.minimum(length, WINDOW)
    over = (tl.maximum(span - 1, 0) // (MIN_SPLIT * MOST)).to(tl.float32)
    doubled = tl.maximum((over.to(tl.int32, bitcast=True) >> 23) - 126, 0)  # binary digits, from the exponent
    smallest = (length + MIN_SPLIT - 1) // MIN_SPLIT
    first = length * 0
    if WINDOW > 0:
        first = (tl.maximum(length - WINDOW, 0) // MIN_SPLIT) >> doubled
    return first, ((smallest + (1 << doubled) - 1) >> doubled) - first, (first * 0 + MIN_SPLIT) << doubled


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
