"""What the kernels over experts' weights share: which rows a block has, and what follows the sums."""

from __future__ import annotations

import triton
import triton.language as tl

from headrace.kernels.linear.triton_parts import GATES as _GATES
from headrace.kernels.linear.triton_parts import apply_gate

__all__ = ["GATES", "block_of", "rows_of", "store"]

GATES = {**_GATES, "clamped_swiglu": 4}


@triton.jit
def block_of(contents_ptr, block):
    """The expert of a block, and its number of rows (0: there are none)."""
    found = tl.load(contents_ptr + block)
    return found % 65536, found // 65536


@triton.jit
def rows_of(pairs_ptr, block, count, P, BM: tl.constexpr, SHARED: tl.constexpr):
    """Pairs of a block (P where there is none), and their rows of x (then some row), int32 [BM]."""
    at = tl.arange(0, BM)
    pair = tl.load(pairs_ptr + block * BM + at, mask=at < count, other=P)
    return pair, tl.minimum(pair, P - 1) // SHARED


@triton.jit
def gate_mul(first, second, GATE: tl.constexpr):
    """One of GATES of float32 numbers, see kernels.experts.EXPERT_GATES."""
    if GATE == 4:
        first = tl.minimum(first, 7.0, propagate_nan=tl.PropagateNan.ALL)
        second = tl.clamp(second, -7.0, 7.0, propagate_nan=tl.PropagateNan.ALL)
        y = first * tl.sigmoid(1.702 * first) * (second + 1.0)
    else:
        y = apply_gate(first, GATE) * second
    return y


@triton.jit
def store(acc, acc2, first, n, pair, bias_ptr, out_ptr, P, N, BIAS: tl.constexpr, GATE: tl.constexpr):
    """Bias, gate, and out[pair, n] of sums [BN, BM]; ``first``: the expert's first row of the weights."""
    if BIAS:
        at = bias_ptr + first + tl.minimum(n, N - 1)
        acc += tl.load(at).to(tl.float32)[:, None]
        if GATE > 0:
            acc2 += tl.load(at + N).to(tl.float32)[:, None]
    if GATE > 0:
        acc = gate_mul(acc, acc2, GATE)
    to = out_ptr + pair.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(to, acc.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (pair < P)[None, :])
