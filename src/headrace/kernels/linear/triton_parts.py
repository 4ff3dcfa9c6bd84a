"""What the kernels of few rows share: weights asked for ahead, adding up the parts of K, and what follows the sums."""

from __future__ import annotations

import triton
import triton.language as tl

from headrace.kernels.launch import Scratch, prefetch_l2

__all__ = ["GATES", "SCRATCH", "apply_gate", "ask_l2", "finish", "gather_parts", "tell_largest"]

GATES = {None: 0, "silu": 1, "gelu_tanh": 2, "gelu": 3}
SCRATCH = Scratch()


@triton.jit
def apply_gate(x, GATE: tl.constexpr):
    """One of GATES of float32 numbers."""
    if GATE == 1:
        y = x * tl.sigmoid(x)
    elif GATE == 2:
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return y


@triton.jit
def ask_l2(w_ptr, near, lo, hi, N, K, BK: tl.constexpr, AHEAD: tl.constexpr, GATE: tl.constexpr):
    """Ask L2 for the first AHEAD tiles of weights [N or 2 N, K], rows ``near`` and columns from lo on."""
    LINE: tl.constexpr = 64
    lines = tl.arange(0, BK // LINE) * LINE
    ahead = w_ptr + near.to(tl.int64)[:, None] * K
    for k in range(lo, tl.minimum(hi, lo + AHEAD * BK), BK):
        line = ahead + tl.minimum(k + lines, K - 1)[None, :]
        prefetch_l2(line)
        if GATE > 0:
            prefetch_l2(line + N.to(tl.int64) * K)


@triton.jit
def gather_parts(acc, acc2, parts_ptr, arrivals_ptr, tile, split, m, BM: tl.constexpr, BN: tl.constexpr,
                 SPLITS: tl.constexpr, GATE: tl.constexpr):  # fmt: skip
    """(sums over all of K, those of the gate's other half, whether this program is the last of its tile).

    The last program to arrive adds the parts in order, so that results do not depend on timing.
    parts: float32 [tiles, SPLITS, BN or 2 BN, BM]. m: 0 .. BM.
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
    """Bias, gate, residual, store: sums [BN, BM] of outputs ``rows`` (``near``: at most N - 1) and inputs m.

    Returns what was stored.
    """
    if BIAS:
        acc += tl.load(bias_ptr + near).to(tl.float32)[:, None]
    if GATE > 0:
        if BIAS:
            acc2 += tl.load(bias_ptr + near + N).to(tl.float32)[:, None]
        acc = apply_gate(acc, GATE) * acc2
    ok = (rows < N)[:, None] & m_ok[None, :]
    at = m[None, :].to(tl.int64) * N + rows[:, None]
    if RESIDUAL:
        acc += tl.load(res_ptr + at, mask=ok, other=0.0).to(tl.float32)
    y = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, y, mask=ok)
    return y


@triton.jit
def tell_largest(acc, rows, m, m_ok, top_ptr, best_ptr, N, tile, num_tiles):
    """The largest of each column of [BN, BM] and the lowest row that has it; NaN counts as infinity."""
    bad = (acc != acc) | (acc == float("inf"))
    acc = tl.where((rows < N)[:, None], tl.where(bad, float("inf"), acc), float("-inf"))
    top = tl.max(acc, 0)
    first = tl.min(tl.where(acc == top[None, :], rows[:, None], 2147483647), 0)
    at = m * num_tiles + tile
    tl.store(top_ptr + at, top, mask=m_ok)
    tl.store(best_ptr + at, first, mask=m_ok)
