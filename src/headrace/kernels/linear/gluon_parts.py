"""What rings share: the copy engine fills places in shared memory, of weights before the wait for the kernel before."""

from __future__ import annotations

import functools

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from headrace.kernels.linear.tuning import RingShape

__all__ = [
    "ask_next",
    "begin",
    "descriptors",
    "gate_of",
    "gather_parts",
    "grid_dependency",
    "load_bias",
    "out_layout",
    "outputs",
    "unfold",
]


@gluon.jit
def grid_dependency(INSTRUCTION: gl.constexpr):
    """Of programmatic dependent launch: launch_dependents or wait."""
    gl.inline_asm_elementwise(INSTRUCTION, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def gate_of(x, GATE: gl.constexpr):
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
def begin(
    x_desc, w_desc, N, K, BYTES: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    FOLD: gl.constexpr, SPLITS: gl.constexpr, STAGES: gl.constexpr, GATE: gl.constexpr,
):  # fmt: skip
    """Shared memory with the first weights on their way, and this program's share: of its tile ``count`` steps of K."""
    HALVES: gl.constexpr = 2 if GATE > 0 else 1
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
    return x_smem, w_smem, bars, tile, split, w_row, half, lo, count


@gluon.jit
def ask_next(x_desc, w_desc, x_smem, w_smem, bars, t, w_row, half, lo, count, BYTES: gl.constexpr,
             STAGES: gl.constexpr, GATE: gl.constexpr):  # fmt: skip
    """Fill the place of tile t, which has been multiplied, with the tile STAGES further on."""
    if t + STAGES < count:
        gl.thread_barrier()  # all warps have read the tile
        slot, k = t % STAGES, lo + (t + STAGES) * w_desc.block_shape[1]
        _ask_weights(w_desc, bars, w_smem, slot, w_row, half, k, BYTES, GATE)
        tma.async_copy_global_to_shared(x_desc, [0, k], bars.index(slot), x_smem.index(slot))


@gluon.jit
def outputs(tile, M, N, BM: gl.constexpr, BN: gl.constexpr, OUT: gl.constexpr):
    """(rows of the weights [BN], rows of x [BM], which of them and of their products exist, where those are stored)."""
    rows, m = tile * BN + gl.arange(0, BN, gl.SliceLayout(1, OUT)), gl.arange(0, BM, gl.SliceLayout(0, OUT))
    n_ok, m_ok = rows < N, m < M
    return rows, m, n_ok, m_ok, n_ok[:, None] & m_ok[None, :], m[None, :].to(gl.int64) * N + rows[:, None]


@gluon.jit
def load_bias(bias_ptr, rows, n_ok, N, BIAS: gl.constexpr, GATE: gl.constexpr):
    """float32 bias of rows and of their gates' other halves."""
    bias, bias2 = n_ok, n_ok  # nothing
    if BIAS:
        bias = gl.load(bias_ptr + rows, mask=n_ok, other=0.0).to(gl.float32)
        if GATE > 0:
            bias2 = gl.load(bias_ptr + N + rows, mask=n_ok, other=0.0).to(gl.float32)
    return bias, bias2


@gluon.jit
def unfold(acc, X_FIRST: gl.constexpr, FOLD: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, MMA: gl.constexpr,
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
def gather_parts(
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


def descriptors(x: Tensor, weight: Tensor, shape: RingShape) -> tuple[TensorDescriptor, TensorDescriptor]:
    """The memory of contiguous rows [M, K] and weights [N, K], folded as the shape says, and their tiles."""
    return _folded(x, shape.bm, shape), _folded(weight, shape.bn, shape)


def _folded(matrix: Tensor, tile: int, shape: RingShape) -> TensorDescriptor:
    rows, columns = matrix.shape[0] * shape.fold, matrix.shape[1] // shape.fold
    block = [tile * shape.fold, shape.bk]
    # Any type of 16 bits has the layout of bfloat16.
    layout = gl.NVMMASharedLayout.get_default_for(
        block, gl.bfloat16 if matrix.itemsize == 2 else gl.float8e4nv
    )
    return TensorDescriptor(matrix, [rows, columns], [columns, 1], block, layout)


@functools.cache
def out_layout(bn: int, bm: int) -> gl.BlockedLayout:
    """Of outputs [bn, bm], neighbours in memory along bn: up to 8 a thread."""
    vector = max(1, min(8, bn * bm // 128), bn // 32)
    threads = bn // vector
    return gl.BlockedLayout([vector, 1], [threads, 32 // threads], [1, 4], [0, 1])
