"""What the kernels of few rows share: adding up the parts of K, and what follows the sums."""

from __future__ import annotations

import triton
import triton.language as tl

from headrace.kernels.linear.triton import _gate

__all__ = ["FP8_MAX", "finish", "gather_parts", "round_tile"]

FP8_MAX = tl.constexpr(448.0)


@triton.jit
def gather_parts(acc, acc2, parts_ptr, arrivals_ptr, tile, split, m, BM: tl.constexpr, BN: tl.constexpr,
                 SPLITS: tl.constexpr, GATE: tl.constexpr):  # fmt: skip
    """(sums over all of K, those of the gate's other half, whether this program is the last of its tile).

    The last program to arrive adds the parts in order, so that results do not depend on timing.
    parts: float32 [tiles, SPLITS, BN or 2 BN, BM].
    """
    TALL: tl.constexpr = 2 * BN if GATE > 0 else BN
    n = tl.arange(0, BN)
    base = parts_ptr + tile.to(tl.int64) * (SPLITS * TALL * BM)
    mine = base + split * (TALL * BM)
    tl.store(mine + n[:, None] * BM + m[None, :], acc)
    if GATE > 0:
        tl.store(mine + (BN + n[:, None]) * BM + m[None, :], acc2)
    tl.debug_barrier()
    last = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if last:
        tl.debug_barrier()
        acc = tl.zeros([BN, BM], tl.float32)
        acc2 = tl.zeros([BN, BM], tl.float32)
        for i in tl.static_range(SPLITS):
            part = base + i * (TALL * BM)
            acc += tl.load(part + n[:, None] * BM + m[None, :], cache_modifier=".cg")
            if GATE > 0:
                acc2 += tl.load(part + (BN + n[:, None]) * BM + m[None, :], cache_modifier=".cg")
        tl.store(arrivals_ptr + tile, 0)
    return acc, acc2, last


@triton.jit
def finish(acc, acc2, rows, near, m, m_ok, bias_ptr, res_ptr, out_ptr, N, BIAS: tl.constexpr, GATE: tl.constexpr,
           RESIDUAL: tl.constexpr, STORE: tl.constexpr):  # fmt: skip
    """Bias, gate, residual, store: sums [BN, BM] of outputs ``rows`` (``near``: at most N - 1) and inputs m.

    Returns them as float32, as they are (to be) stored.
    """
    if BIAS:
        acc += tl.load(bias_ptr + near).to(tl.float32)[:, None]
    if GATE > 0:
        if BIAS:
            acc2 += tl.load(bias_ptr + near + N).to(tl.float32)[:, None]
        acc = _gate(acc, GATE) * acc2
    ok = (rows < N)[:, None] & m_ok[None, :]
    at = m[None, :].to(tl.int64) * N + rows[:, None]
    if RESIDUAL:
        acc += tl.load(res_ptr + at, mask=ok, other=0.0).to(tl.float32)
    y = acc.to(out_ptr.dtype.element_ty)
    if STORE:
        tl.store(out_ptr + at, y, mask=ok)
    return y.to(tl.float32)


@triton.jit
def round_tile(y, tile, rows, m, m_ok, gain_ptr, codes_ptr, scale_ptr, squares_ptr, N, tiles,
               GAIN: tl.constexpr):  # fmt: skip
    """Outputs [BN, BM] rounded to FP8 for the next product, BN columns a scale.

    With GAIN they are the residual stream: times the next norm's gain, and beside them the sums of their squares.
    """
    at = m.to(tl.int64) * tiles + tile
    if GAIN:
        tl.store(squares_ptr + at, tl.sum(y * y, 0), mask=m_ok)
        y = y * tl.load(gain_ptr + rows).to(tl.float32)[:, None]
    scale = tl.maximum(tl.max(tl.abs(y), 0), 1e-10) / FP8_MAX
    tl.store(scale_ptr + at, scale, mask=m_ok)
    codes = tl.clamp(y / scale[None, :], -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
    to = codes_ptr + m[None, :].to(tl.int64) * N + rows[:, None]
    tl.store(to, codes.to(codes_ptr.dtype.element_ty), mask=tl.broadcast_to(m_ok[None, :], codes.shape))
