"""Products of many rows with the chosen experts' FP4 weights, decoded in the registers that the tensor cores read.

As kernels/quantized_linear/gluon_wide.py, whose sums this takes. Rows of x are gathered in the order of the plan's
blocks, and their columns in the order in which they are multiplied, by a kernel of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.kernels.experts.plan import ExpertPlan
from headrace.kernels.experts.triton_parts import GATES
from headrace.kernels.experts.tuning import ExpertCodesShape
from headrace.kernels.launch import launch_options
from headrace.kernels.linear.gluon_parts import gate_of, grid_dependency
from headrace.kernels.quantized_linear.gluon_wide import arranged, outputs_layout, rows_descriptor, wide_sums

__all__ = ["expert_wide_codes"]


@triton.jit(do_not_specialize=["P"])
def _gather(x_ptr, x_row, pairs_ptr, contents_ptr, out_ptr, P, K, SHARED: tl.constexpr, BM: tl.constexpr,
            BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One row of a block, BLOCK columns of it."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    if row % BM < tl.load(contents_ptr + row // BM) // 65536:
        source = tl.load(pairs_ptr + row).to(tl.int64) // SHARED
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + source * x_row + arranged(at), mask=at < K, other=0.0)
        tl.store(out_ptr + row.to(tl.int64) * K + at, x, mask=at < K)


@gluon.jit
def _gated(first, second, GATE: gl.constexpr):
    """As gate_mul of triton_parts."""
    if GATE == 4:
        first = gl.where(first > 7.0, 7.0, first)  # a NaN stays one
        second = gl.where(second > 7.0, 7.0, gl.where(second < -7.0, -7.0, second))
        y = first / (1.0 + gl.exp(-1.702 * first)) * (second + 1.0)
    else:
        y = gate_of(first, GATE) * second
    return y


@gluon.jit
def _finished(sums, n, N, first, row_scale_ptr, bias_ptr, UP: gl.constexpr, BIAS: gl.constexpr):
    """Sums [n, rows] times the scales of outputs ``first`` + n, and their biases."""
    near = first + gl.minimum(n, N - 1)
    sums = sums * (gl.load(row_scale_ptr + near) * UP)[:, None]
    if BIAS:
        sums += gl.load(bias_ptr + near).to(gl.float32)[:, None]
    return sums


@gluon.jit(do_not_specialize=["P"])
def _expert_wide(
    x_desc, w_ptr, scale_ptr, row_scale_ptr, bias_ptr, out_ptr, pairs_ptr, contents_ptr, P, N, R, blocks, tiles_of_n,
    T: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, BIAS: gl.constexpr,
    GATE: gl.constexpr, OUT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """out[pair, n] for the BM pairs of a block and T tiles of 16 outputs; with a gate, of both halves.

    R tiles of rows an expert; ``blocks`` of 128 columns.
    """
    if PDL:
        grid_dependency("griddepcontrol.launch_dependents; mov.b32 $0, 0;")
        grid_dependency("griddepcontrol.wait; mov.b32 $0, 0;")
    TALL: gl.constexpr = 8 * T if GATE > 0 else 16 * T
    HALVES: gl.constexpr = 2 if GATE > 0 else 1
    UP: gl.constexpr = 65536.0 if GROUP == 16 else 1.0
    tile, block = gl.program_id(0) % tiles_of_n, gl.program_id(0) // tiles_of_n
    found = gl.load(contents_ptr + block)
    expert, count = found % 65536, found // 65536
    if count > 0:
        which = gl.arange(0, T, gl.SliceLayout(1, OUT))
        if GATE > 0:
            which = tile * (T // 2) + which % (T // 2) + which // (T // 2) * (N // 16)
        else:
            which = tile * T + which
        tiles = expert.to(gl.int64) * R + gl.minimum(which, R - 1).to(gl.int64)
        sums = wide_sums(
            x_desc, block * BM, w_ptr, scale_ptr, tiles, blocks, 0, blocks, T, BM, STAGES, GROUP, False
        )
        n = tile * TALL + gl.arange(0, TALL, gl.SliceLayout(1, OUT))
        first = expert.to(gl.int64) * (N * HALVES)
        if GATE > 0:
            low, high = gl.split(gl.permute(sums.reshape([2, TALL, BM]), (1, 2, 0)))
            low = _finished(gl.convert_layout(low, OUT), n, N, first, row_scale_ptr, bias_ptr, UP, BIAS)
            high = _finished(gl.convert_layout(high, OUT), n, N, first + N, row_scale_ptr, bias_ptr, UP, BIAS)
            y = _gated(low, high, GATE)
        else:
            y = _finished(gl.convert_layout(sums, OUT), n, N, first, row_scale_ptr, bias_ptr, UP, BIAS)
        m = gl.arange(0, BM, gl.SliceLayout(0, OUT))
        pair = gl.load(pairs_ptr + block * BM + m, mask=m < count, other=0).to(gl.int64)
        to = out_ptr + pair[None, :] * N + n[:, None]
        gl.store(to, y.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (m < count)[None, :])


def expert_wide_codes(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    row_scale: Tensor,
    plan: ExpertPlan,
    *,
    rows: int,
    group: int,
    bias: Tensor | None,
    gate: str | None,
    shape: ExpertCodesShape,
) -> Tensor:
    """As triton_codes.expert_codes, of bfloat16 x and FP4 weights that gluon_wide.covers; K a multiple of 64."""
    assert plan.pairs is not None and plan.contents is not None and shape.bm == plan.block
    k, each = x.shape[1], rows // plan.num_experts
    n = each // (1 if gate is None else 2)
    high = shape.tiles * 16 // (1 if gate is None else 2)
    across, count = triton.cdiv(n, high), plan.contents.numel()
    ordered = torch.empty(plan.pairs.numel(), k, dtype=x.dtype, device=x.device)
    _gather[(plan.pairs.numel(), triton.cdiv(k, 1024))](
        x, x.stride(0), plan.pairs, plan.contents, ordered, plan.num_pairs, k, SHARED=plan.num_pairs // x.shape[0],
        BM=plan.block, BLOCK=1024, **launch_options(x.device, 4, 1),
    )  # fmt: skip
    out = torch.empty(plan.num_pairs, n, dtype=x.dtype, device=x.device)
    _expert_wide[(across * count,)](
        rows_descriptor(ordered, plan.block), words, scale, row_scale, x if bias is None else bias, out, plan.pairs,
        plan.contents, plan.num_pairs, n, each // 16, words.shape[1] // 2, across, T=shape.tiles, BM=plan.block,
        STAGES=shape.stages, GROUP=group, BIAS=bias is not None, GATE=GATES[gate],
        OUT=outputs_layout(high, shape.warps), PDL=True, num_warps=shape.warps, launch_pdl=True,
    )  # fmt: skip
    return out
