"""FP8 weights with FP8 rows in rings: weights are in shared memory before the kernel before them has ended.

As kernels/linear/gluon_ring.py, whose parts this takes. Each tile's products leave the tensor core's own imprecise
accumulator (128 columns at most); scales of rows and outputs multiply the sums at the end.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
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
from headrace.kernels.linear.triton_parts import GATES, SCRATCH
from headrace.kernels.linear.tuning import RingShape

__all__ = ["covers", "ring_product"]


@gluon.jit
def _products(
    x_desc, w_desc, x_smem, w_smem, bars, w_row, half, lo, count, BYTES: gl.constexpr, STAGES: gl.constexpr,
    GATE: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Sums over ``count`` tiles of K, the first STAGES of which are on their way; those of both halves of a gate."""
    HIGH: gl.constexpr = w_smem.shape[1]
    WIDE: gl.constexpr = x_smem.shape[1]
    acc = gl.zeros([HIGH, WIDE], gl.float32, MMA)
    acc2 = gl.zeros([HIGH, WIDE], gl.float32, MMA)
    for t in range(count):
        slot = t % STAGES
        mbarrier.wait(bars.index(slot), (t // STAGES) & 1)
        x = x_smem.index(slot).permute((1, 0))
        none = gl.zeros([HIGH, WIDE], gl.float32, MMA)
        if GATE > 0:
            first = warpgroup_mma(w_smem.index(2 * slot), x, none, use_acc=False, is_async=True)
            second = warpgroup_mma(w_smem.index(2 * slot + 1), x, none, use_acc=False, is_async=True)
            first, second = warpgroup_mma_wait(0, deps=(first, second))
            acc, acc2 = acc + first, acc2 + second
        else:
            first = warpgroup_mma(w_smem.index(slot), x, none, use_acc=False, is_async=True)
            acc += warpgroup_mma_wait(0, deps=(first,))
        ask_next(x_desc, w_desc, x_smem, w_smem, bars, t, w_row, half, lo, count, BYTES, STAGES, GATE)
    return acc, acc2


@gluon.jit
def _ring(
    x_desc, w_desc, out_ptr, row_scale_ptr, xs_ptr, bias_ptr, res_ptr, parts_ptr, arrivals_ptr, M, N, K,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, FOLD: gl.constexpr, SPLITS: gl.constexpr,
    STAGES: gl.constexpr, STATIC: gl.constexpr, BIAS: gl.constexpr, GATE: gl.constexpr, RESIDUAL: gl.constexpr,
    OUT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """out[m, n] for all M <= BM rows and BN columns, over one of SPLITS ranges of K; with a gate rows n and N + n."""
    if PDL:
        grid_dependency("griddepcontrol.launch_dependents; mov.b32 $0, 0;")
    HALVES: gl.constexpr = 2 if GATE > 0 else 1
    BYTES: gl.constexpr = (HALVES * BN + BM) * FOLD * BK
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM * FOLD, 32])
    x_smem, w_smem, bars, tile, split, w_row, half, lo, count = begin(
        x_desc, w_desc, N, K, BYTES, BM, BN, BK, FOLD, SPLITS, STAGES, GATE
    )  # fmt: skip
    rows, m, n_ok, m_ok, ok, at = outputs(tile, M, N, BM, BN, OUT)
    scale = gl.load(row_scale_ptr + rows, mask=n_ok, other=0.0)
    scale2 = scale  # nothing
    if GATE > 0:
        scale2 = gl.load(row_scale_ptr + N + rows, mask=n_ok, other=0.0)
    bias, bias2 = load_bias(bias_ptr, rows, n_ok, N, BIAS, GATE)
    if PDL:
        grid_dependency("griddepcontrol.wait; mov.b32 $0, 0;")
    for i in gl.static_range(STAGES):
        if i < count:
            tma.async_copy_global_to_shared(x_desc, [0, lo + i * BK], bars.index(i), x_smem.index(i))
    # What the end needs is on its way while products run.
    residual = ok  # nothing
    xs = gl.load(xs_ptr + (m * 0 if STATIC else m), mask=m_ok, other=0.0)
    if RESIDUAL:
        residual = gl.load(res_ptr + at, mask=ok, other=0.0)
    acc, acc2 = _products(
        x_desc, w_desc, x_smem, w_smem, bars, w_row, half, lo, count, BYTES, STAGES, GATE, MMA
    )  # fmt: skip
    acc = unfold(acc, False, FOLD, BM, BN, MMA, OUT)
    acc2 = unfold(acc2, False, FOLD, BM, BN, MMA, OUT) if GATE > 0 else acc
    last = True
    if SPLITS > 1:
        acc, acc2, last = gather_parts(
            acc, acc2, parts_ptr, arrivals_ptr, tile, split, BM, BN, SPLITS, GATE, OUT
        )
    if last:
        acc = acc * scale[:, None] * xs[None, :]
        if BIAS:
            acc += bias[:, None]
        if GATE > 0:
            acc2 = acc2 * scale2[:, None] * xs[None, :]
            if BIAS:
                acc2 += bias2[:, None]
            acc = gate_of(acc, GATE) * acc2
        if RESIDUAL:
            acc += residual.to(gl.float32)
        gl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=ok)


def covers(x: Tensor, weight: Tensor, shape: RingShape) -> bool:
    """Whether rows [M, K] and weight [N, K] fit this shape."""
    aligned = weight.data_ptr() % 16 == 0 and weight.shape[1] % (16 * shape.fold) == 0
    return x.shape[0] <= shape.bm and x.is_contiguous() and weight.is_contiguous() and aligned


def ring_product(
    x: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    x_scale: Tensor,
    *,
    bias: Tensor | None,
    gate: str | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    shape: RingShape,
) -> Tensor:
    """As small_product: x float8_e4m3fn [M, K], weight [N, K], row_scale float32 [N], x_scale float32 [M, 1] or one."""
    num_rows, k = x.shape
    n = weight.shape[0] // (1 if gate is None else 2)
    tiles = triton.cdiv(n, shape.bn)
    out = torch.empty(num_rows, n, dtype=out_dtype, device=x.device)
    parts = arrivals = out
    if shape.splits > 1:
        height = (1 if gate is None else 2) * shape.bn
        parts, arrivals = SCRATCH.get(x.device, tiles * shape.splits * height * shape.bm, tiles)
    flags: dict[str, Any] = {
        "STATIC": x_scale.dim() == 0, "BIAS": bias is not None, "GATE": GATES[gate], "RESIDUAL": residual is not None,
    }  # fmt: skip
    _ring[(tiles * shape.splits,)](
        *descriptors(x, weight, shape), out, row_scale, x_scale, x if bias is None else bias,
        out if residual is None else residual, parts, arrivals, num_rows, n, k, BM=shape.bm, BN=shape.bn, BK=shape.bk,
        FOLD=shape.fold, SPLITS=shape.splits, STAGES=shape.stages, OUT=out_layout(shape.bn, shape.bm), PDL=True,
        num_warps=4, launch_pdl=True, **flags,
    )  # fmt: skip
    return out
