"""The same maps with shared memory in our own hands: weights are there before the kernel before them has ended.

A program asks the copy engine for the first tiles of its weights, and only then waits for its predecessor
(programmatic dependent launch): what an earlier kernel leaves of the memory's time is not lost. Written in Gluon, since
Triton's own pipelines begin behind the wait.

Few rows and few columns leave most of the device idle, and sums over splits of K cost more than the products. With
``fold`` K is folded into rows instead: a weight [N, K] is also a matrix [N * fold, K / fold], rows of x likewise, and
those products whose fold agrees add up to the outputs. The others are thrown away; tensor cores have time for them.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from headrace.kernels.linear.gluon_parts import (
    ask_next,
    begin,
    descriptors,
    gate_of,
    gather_parts,
    grid_dependency,
    load_bias,
    out_layout,
    outputs,
    unfold,
)
from headrace.kernels.linear.tuning import RingShape

__all__ = ["covers", "launch"]


@gluon.jit
def _product(w, x, acc, X_FIRST: gl.constexpr):
    if X_FIRST:
        product = warpgroup_mma(x, w.permute((1, 0)), acc, is_async=True)
    else:
        product = warpgroup_mma(w, x.permute((1, 0)), acc, is_async=True)
    return product


@gluon.jit
def _products(
    x_desc, w_desc, x_smem, w_smem, bars, w_row, half, lo, count, BYTES: gl.constexpr, STAGES: gl.constexpr,
    GATE: gl.constexpr, X_FIRST: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Sums over ``count`` tiles of K, the first STAGES of which are on their way; those of both halves of a gate."""
    HIGH: gl.constexpr = x_smem.shape[1] if X_FIRST else w_smem.shape[1]
    WIDE: gl.constexpr = w_smem.shape[1] if X_FIRST else x_smem.shape[1]
    acc = gl.zeros([HIGH, WIDE], gl.float32, MMA)
    acc2 = gl.zeros([HIGH, WIDE], gl.float32, MMA)
    for t in range(count):
        slot = t % STAGES
        mbarrier.wait(bars.index(slot), (t // STAGES) & 1)
        x = x_smem.index(slot)
        if GATE > 0:
            first = _product(w_smem.index(2 * slot), x, acc, X_FIRST)
            second = _product(w_smem.index(2 * slot + 1), x, acc2, X_FIRST)
            acc, acc2 = warpgroup_mma_wait(0, deps=(first, second))
        else:
            first = _product(w_smem.index(slot), x, acc, X_FIRST)
            acc = warpgroup_mma_wait(0, deps=(first,))
        ask_next(x_desc, w_desc, x_smem, w_smem, bars, t, w_row, half, lo, count, BYTES, STAGES, GATE)
    return acc, acc2


@gluon.jit
def _tell_largest(acc, rows, n_ok, m, m_ok, top_ptr, best_ptr, tile, num_tiles):
    """As tell_largest of triton_parts."""
    bad = (acc != acc) | (acc == float("inf"))
    acc = gl.where(n_ok[:, None], gl.where(bad, float("inf"), acc), float("-inf"))
    top = gl.max(acc, 0)
    first = gl.min(gl.where(acc == top[None, :], rows[:, None], 2147483647), 0)
    gl.store(top_ptr + m * num_tiles + tile, top, mask=m_ok)
    gl.store(best_ptr + m * num_tiles + tile, first, mask=m_ok)


@gluon.jit
def _finish(
    acc, acc2, bias, bias2, residual, next_gain, ok, at, m, m_ok, out_ptr, next_ptr, next_squares_ptr, tile, M,
    BIAS: gl.constexpr, GATE: gl.constexpr, RESIDUAL: gl.constexpr, NEXT: gl.constexpr,
):  # fmt: skip
    """Bias, gate and residual of sums [BN, BM], stored; NEXT: times the next gain too, and their squares."""
    if BIAS:
        acc += bias[:, None]
    if GATE > 0:
        if BIAS:
            acc2 += bias2[:, None]
        acc = gate_of(acc, GATE) * acc2
    if RESIDUAL:
        acc += residual.to(gl.float32)
    y = acc.to(out_ptr.dtype.element_ty)
    gl.store(out_ptr + at, y, mask=ok)
    if NEXT:
        wide = gl.where(ok, y.to(gl.float32), 0.0)
        gl.store(next_ptr + at, (wide * next_gain[:, None]).to(next_ptr.dtype.element_ty), mask=ok)
        gl.store(next_squares_ptr + tile * M + m, gl.sum(wide * wide, 0), mask=m_ok)


@gluon.jit
def _ring(
    x_desc, w_desc, out_ptr, bias_ptr, res_ptr, best_ptr, squares_ptr, next_gain_ptr, next_ptr,
    next_squares_ptr, parts_ptr, arrivals_ptr, M, N, K, num_squares, eps,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, FOLD: gl.constexpr, SPLITS: gl.constexpr,
    STAGES: gl.constexpr, SQUARES: gl.constexpr, BIAS: gl.constexpr, GATE: gl.constexpr, RESIDUAL: gl.constexpr,
    NEXT: gl.constexpr, ARGMAX: gl.constexpr, X_FIRST: gl.constexpr, OUT: gl.constexpr, SUMS: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """As _stream, for M <= BM."""
    if PDL:
        grid_dependency("griddepcontrol.launch_dependents; mov.b32 $0, 0;")
    HALVES: gl.constexpr = 2 if GATE > 0 else 1
    BYTES: gl.constexpr = (HALVES * BN + BM) * FOLD * BK * 2
    COLS: gl.constexpr = BN if X_FIRST else BM
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS * FOLD, 16])
    x_smem, w_smem, bars, tile, split, w_row, half, lo, count = begin(
        x_desc, w_desc, N, K, BYTES, BM, BN, BK, FOLD, SPLITS, STAGES, GATE
    )  # fmt: skip
    rows, m, n_ok, m_ok, ok, at = outputs(tile, M, N, BM, BN, OUT)
    bias, bias2 = load_bias(bias_ptr, rows, n_ok, N, BIAS, GATE)
    next_gain = n_ok  # nothing
    if NEXT:
        next_gain = gl.load(next_gain_ptr + rows, mask=n_ok, other=0.0).to(gl.float32)
    if PDL:
        grid_dependency("griddepcontrol.wait; mov.b32 $0, 0;")
    for i in gl.static_range(STAGES):
        if i < count:
            tma.async_copy_global_to_shared(x_desc, [0, lo + i * BK], bars.index(i), x_smem.index(i))
    # What the end needs is on its way while products run.
    residual = ok  # nothing
    if SQUARES > 0:
        p, i_m = gl.arange(0, SQUARES, gl.SliceLayout(1, SUMS)), gl.arange(0, BM, gl.SliceLayout(0, SUMS))
        known = (p < num_squares)[:, None] & (i_m < M)[None, :]
        squares = gl.load(squares_ptr + p[:, None] * M + i_m[None, :], mask=known, other=0.0)
    if RESIDUAL:
        residual = gl.load(res_ptr + at, mask=ok, other=0.0)
    acc, acc2 = _products(
        x_desc, w_desc, x_smem, w_smem, bars, w_row, half, lo, count, BYTES, STAGES, GATE, X_FIRST, MMA
    )  # fmt: skip
    acc = unfold(acc, X_FIRST, FOLD, BM, BN, MMA, OUT)
    acc2 = unfold(acc2, X_FIRST, FOLD, BM, BN, MMA, OUT) if GATE > 0 else acc
    last = True
    if SPLITS > 1:
        acc, acc2, last = gather_parts(
            acc, acc2, parts_ptr, arrivals_ptr, tile, split, BM, BN, SPLITS, GATE, OUT
        )
    if last:
        if SQUARES > 0:
            scale = gl.convert_layout(gl.rsqrt(gl.sum(squares, 0) / K + eps), gl.SliceLayout(0, OUT))
            acc, acc2 = acc * scale[None, :], acc2 * scale[None, :]
        if ARGMAX:
            _tell_largest(acc, rows, n_ok, m, m_ok, out_ptr, best_ptr, tile, gl.num_programs(0) // SPLITS)
        else:
            _finish(acc, acc2, bias, bias2, residual, next_gain, ok, at, m, m_ok, out_ptr, next_ptr,
                    next_squares_ptr, tile, M, BIAS, GATE, RESIDUAL, NEXT)  # fmt: skip


def covers(x: Tensor, weight: Tensor, shape: RingShape) -> bool:
    """Whether rows [M, K] and weight [N, K] fit this shape."""
    return x.shape[0] <= shape.bm and x.is_contiguous() and weight.shape[1] % (8 * shape.fold) == 0


def launch(x: Tensor, weight: Tensor, shape: RingShape, grid: int, *args: Any, **flags: Any) -> None:
    """``args`` and ``flags``: those of _ring from out_ptr on that the shape does not say."""
    _ring[(grid,)](
        *descriptors(x, weight, shape), *args, BM=shape.bm, BN=shape.bn, BK=shape.bk, FOLD=shape.fold,
        SPLITS=shape.splits, STAGES=shape.stages, X_FIRST=bool(shape.x_first), OUT=out_layout(shape.bn, shape.bm),
        SUMS=_sums_layout(shape.bm), PDL=True, num_warps=4, launch_pdl=True, **flags,
    )  # fmt: skip


@functools.cache
def _sums_layout(bm: int) -> gl.BlockedLayout:
    """Of sums of squares [parts, bm]."""
    across = min(bm, 32)
    return gl.BlockedLayout([1, 1], [32 // across, across], [4, 1], [1, 0])
