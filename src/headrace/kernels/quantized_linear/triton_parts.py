"""What the kernels of few rows share: adding up the parts of K, and what follows the sums."""

from __future__ import annotations

import triton
import triton.language as tl

from headrace.kernels.linear.triton import _gate

__all__ = ["FP8_MAX", "finish", "gather_parts"]

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
           RESIDUAL: tl.constexpr):  # fmt: skip
    """Bias, gate, residual, store: sums [BN, BM] of outputs ``rows`` (``near``: at most N - 1) and inputs m."""
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
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=ok)
