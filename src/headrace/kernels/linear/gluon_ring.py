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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from headrace.kernels.linear.tuning import RingShape

__all__ = ["covers", "launch"]


@gluon.jit
def _grid_dependency(INSTRUCTION: gl.constexpr):
    """Of programmatic dependent launch: launch_dependents or wait."""
    gl.inline_asm_elementwise(INSTRUCTION, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _gate(x, GATE: gl.constexpr):
    if GATE == 1:
        y = x / (1.0 + gl.exp(-x))
    elif GATE == 2:
        y = x / (1.0 + gl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        y = 0.5 * x * (1.0 + gl.erf(x * 0.7071067811865476))
    return y


@gluon.jit
def _ask_weights(w_desc, bars, w_smem, slot, row, half, k, BYTES: gl.constexpr, GATE: gl.constexpr):
    """Load a tile of weights, and its second half; ``BYTES`` counts the rows that follow too."""
    bar = bars.index(slot)
    mbarrier.expect(bar, BYTES)
    if GATE > 0:
        tma.async_copy_global_to_shared(w_desc, [row, k], bar, w_smem.index(2 * slot))
        tma.async_copy_global_to_shared(w_desc, [half + row, k], bar, w_smem.index(2 * slot + 1))
    else:
        tma.async_copy_global_to_shared(w_desc, [row, k], bar, w_smem.index(slot))


@gluon.jit
def _product(w, x, acc, X_FIRST: gl.constexpr):
    if X_FIRST:
        product = warpgroup_mma(x, w.permute((1, 0)), acc, is_async=True)
    else:
        product = warpgroup_mma(w, x.permute((1, 0)), acc, is_async=True)
    return product


@gluon.jit
def _unfold(acc, X_FIRST: gl.constexpr, FOLD: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, MMA: gl.constexpr,
            OUT: gl.constexpr):  # fmt: skip
    """[BN, BM] of products between folds: the sum of those whose fold agrees."""
    HIGH: gl.constexpr = BM if X_FIRST else BN
    WIDE: gl.constexpr = BN if X_FIRST else BM
    if FOLD > 1:
        row = gl.arange(0, HIGH * FOLD, layout=gl.SliceLayout(1, MMA)) % FOLD
        col = gl.arange(0, WIDE * FOLD, layout=gl.SliceLayout(0, MMA)) % FOLD
        acc = gl.where(row[:, None] == col[None, :], acc, 0.0)
        acc = gl.sum(gl.sum(acc.reshape([HIGH, FOLD, WIDE, FOLD]), 3), 1)
    if X_FIRST:
        acc = gl.permute(acc, (1, 0))
    return gl.convert_layout(acc, OUT)


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
        if t + STAGES < count:
            gl.thread_barrier()  # all warps have read the tile
            k = lo + (t + STAGES) * w_desc.block_shape[1]
            _ask_weights(w_desc, bars, w_smem, slot, w_row, half, k, BYTES, GATE)
            tma.async_copy_global_to_shared(x_desc, [0, k], bars.index(slot), x_smem.index(slot))
    return acc, acc2


@gluon.jit
def _gather_parts(
    acc, acc2, parts_ptr, arrivals_ptr, tile, split, BM: gl.constexpr, BN: gl.constexpr, SPLITS: gl.constexpr,
    GATE: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """As gather_parts of triton_parts. parts: float32 [tiles, SPLITS, 1 or 2, BM, BN]."""
    SIZE: gl.constexpr = BM * BN
    HALVES: gl.constexpr = 2 if GATE > 0 else 1
    at = (
        gl.arange(0, BN, gl.SliceLayout(1, OUT))[:, None]
        + gl.arange(0, BM, gl.SliceLayout(0, OUT))[None, :] * BN
    )
    base = parts_ptr + tile.to(gl.int64) * (SPLITS * HALVES * SIZE) + at
    mine = base + split * (HALVES * SIZE)
    gl.store(mine, acc)
    if GATE > 0:
        gl.store(mine + SIZE, acc2)
    gl.thread_barrier()
    last = gl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if last:
        gl.thread_barrier()
        acc = gl.zeros([BN, BM], gl.float32, OUT)
        for i in gl.static_range(SPLITS):
            acc += gl.load(base + i * (HALVES * SIZE), cache_modifier=".cg")
        if GATE > 0:
            acc2 = gl.zeros([BN, BM], gl.float32, OUT)
            for i in gl.static_range(SPLITS):
                acc2 += gl.load(base + (i * HALVES + 1) * SIZE, cache_modifier=".cg")
        gl.store(arrivals_ptr + tile, 0)
    return acc, acc2, last


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
        acc = _gate(acc, GATE) * acc2
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
        _grid_dependency("griddepcontrol.launch_dependents; mov.b32 $0, 0;")
    HALVES: gl.constexpr = 2 if GATE > 0 else 1
    BYTES: gl.constexpr = (HALVES * BN + BM) * FOLD * BK * 2
    COLS: gl.constexpr = BN if X_FIRST else BM
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS * FOLD, 16])
    tile, split, width = gl.program_id(0) // SPLITS, gl.program_id(0) % SPLITS, K // FOLD
    span = (width + SPLITS * BK - 1) // (SPLITS * BK) * BK
    lo = split * span
    count = (gl.minimum(lo + span, width) - lo + BK - 1) // BK
    w_smem = gl.allocate_shared_memory(w_desc.dtype, [STAGES * HALVES, BN * FOLD, BK], w_desc.layout)
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BM * FOLD, BK], x_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
    gl.thread_barrier()
    w_row, half = tile * (BN * FOLD), N * FOLD
    for i in gl.static_range(STAGES):
        if i < count:
            _ask_weights(w_desc, bars, w_smem, i, w_row, half, lo + i * BK, BYTES, GATE)
    rows, m = tile * BN + gl.arange(0, BN, gl.SliceLayout(1, OUT)), gl.arange(0, BM, gl.SliceLayout(0, OUT))
    n_ok, m_ok = rows < N, m < M
    ok = n_ok[:, None] & m_ok[None, :]
    at = m[None, :].to(gl.int64) * N + rows[:, None]
    bias, bias2, next_gain = n_ok, n_ok, n_ok  # nothing
    if BIAS:
        bias = gl.load(bias_ptr + rows, mask=n_ok, other=0.0).to(gl.float32)
        if GATE > 0:
            bias2 = gl.load(bias_ptr + N + rows, mask=n_ok, other=0.0).to(gl.float32)
    if NEXT:
        next_gain = gl.load(next_gain_ptr + rows, mask=n_ok, other=0.0).to(gl.float32)
    if PDL:
        _grid_dependency("griddepcontrol.wait; mov.b32 $0, 0;")
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
    acc = _unfold(acc, X_FIRST, FOLD, BM, BN, MMA, OUT)
    acc2 = _unfold(acc2, X_FIRST, FOLD, BM, BN, MMA, OUT) if GATE > 0 else acc
    last = True
    if SPLITS > 1:
        acc, acc2, last = _gather_parts(
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
    (rows, k), fold = x.shape, shape.fold
    w_desc = _descriptor(weight, weight.shape[0] * fold, k // fold, shape.bn * fold, shape.bk)
    x_desc = _descriptor(x, rows * fold, k // fold, shape.bm * fold, shape.bk)
    _ring[(grid,)](
        x_desc, w_desc, *args, BM=shape.bm, BN=shape.bn, BK=shape.bk, FOLD=fold, SPLITS=shape.splits,
        STAGES=shape.stages, X_FIRST=bool(shape.x_first), OUT=_out_layout(shape.bn, shape.bm),
        SUMS=_sums_layout(shape.bm), PDL=True, num_warps=4, launch_pdl=True, **flags,
    )  # fmt: skip


def _descriptor(
    matrix: Tensor, rows: int, columns: int, block_rows: int, block_columns: int
) -> TensorDescriptor:
    """The memory of a contiguous matrix as [rows, columns]."""
    block = [block_rows, block_columns]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)  # any type of 16 bits
    return TensorDescriptor(matrix, [rows, columns], [columns, 1], block, layout)


@functools.cache
def _out_layout(bn: int, bm: int) -> gl.BlockedLayout:
    """Of outputs [bn, bm], neighbours in memory along bn: up to 8 a thread."""
    vector = max(1, min(8, bn * bm // 128), bn // 32)
    threads = bn // vector
    return gl.BlockedLayout([vector, 1], [threads, 32 // threads], [1, 4], [0, 1])


@functools.cache
def _sums_layout(bm: int) -> gl.BlockedLayout:
    """Of sums of squares [parts, bm]."""
    across = min(bm, 32)
    return gl.BlockedLayout([1, 1], [32 // across, across], [4, 1], [1, 0])
