"""What kernels over tiles of query rows share: which rows a program takes, and the online softmax over a tile of keys.

FlashAttention-2 (Dao 2023); the product of a tile's scores is started before the softmax of the tile before it, so
that tensor cores work while exponentials are taken (FlashAttention-3, Shah et al. 2024).
"""

from __future__ import annotations

import triton
import triton.language as tl

from headrace.kernels.attention.triton_pieces import add_sink

__all__ = ["query_rows", "scores", "soften", "weigh"]


@triton.jit
def query_rows(q_ptr, q_row, q_head, start, new, tile, head, num_heads, G: tl.constexpr, ROWS: tl.constexpr,
               D: tl.constexpr, DP: tl.constexpr):  # fmt: skip
    """(q [ROWS, DP], token of each row in its sequence, offsets of the output [ROWS, DP], which of them exist)."""
    row = tile * ROWS + tl.arange(0, ROWS)
    token = row // G
    d = tl.arange(0, DP)[None, :]
    ok = (row < new * G)[:, None] & (d < D)
    at = (start + token).to(tl.int64)[:, None]
    heads = (head * G + row % G)[:, None]
    q = tl.load(q_ptr + at * q_row + heads * q_head + d, mask=ok, other=0.0)
    return q, token, (at * num_heads + heads) * D + d, ok


@triton.jit
def scores(q, k):
    """float32 [ROWS, TILE]."""
    return tl.dot(q, tl.trans(k.to(q.dtype)), out_dtype=tl.float32, input_precision="ieee")


@triton.jit
def soften(acc, peak, norm, score, seen, scale, soft_cap, CAPPED: tl.constexpr, MASKED: tl.constexpr):
    """(weights [ROWS, TILE], and acc, peak and norm made ready for them), in powers of 2.

    ``scale`` float32 [ROWS] is that of the scores; ``seen`` bool [ROWS, TILE] counts with MASKED.
    """
    if CAPPED:
        score = soft_cap * (2.0 * tl.sigmoid(2.0 * score * scale[:, None] / soft_cap) - 1.0)
        scale = tl.full(scale.shape, 1.0, tl.float32)
    factor = scale * 1.4426950408889634
    if MASKED:
        score = tl.where(seen, score, float("-inf"))
    top = tl.maximum(peak, tl.max(score, 1) * factor)
    safe = top
    if MASKED:
        safe = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp2(score * factor[:, None] - safe[:, None])
    alpha = tl.exp2(peak - safe)
    return p, acc * alpha[:, None], top, norm * alpha + tl.sum(p, 1)


@triton.jit
def weigh(acc, peak, norm, tile, head, sinks_ptr, G: tl.constexpr, ROWS: tl.constexpr, SINKS: tl.constexpr):
    """The sums of query_rows' rows over their denominators, which sinks join."""
    if SINKS:
        heads = head * G + (tile * ROWS + tl.arange(0, ROWS)) % G
        norm = add_sink(norm, peak, sinks_ptr, heads, norm > 0.0)
    return acc / tl.where(norm > 0.0, norm, 1.0)[:, None]
