"""Products with the chosen experts' weights in 8 bits: FP8 meeting FP8 activations or 16-bit ones, and integers.

Blocks of rows, tiles and order as in kernels/experts/triton.py. Sums of FP8 products leave the tensor core's own
imprecise accumulator every 128 columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.kernels.experts.plan import ExpertPlan
from headrace.kernels.experts.triton_parts import GATES, block_of, rows_of, store
from headrace.kernels.experts.tuning import ProductShape, eight_bit_shape
from headrace.kernels.launch import INTERPRETED, launch_options
from headrace.kernels.quantized_linear.eight_bits import FP8, INT8, WIDE_FP8, EightBitWeight, launch_inputs
from headrace.kernels.quantized_linear.triton import eight_bits

__all__ = ["FP8", "INT8", "WIDE_FP8", "EightBitWeight", "expert_eight_bits"]


@triton.jit
def _part(x_at, xs, w_ptr, scale_ptr, zero_ptr, rows, k, K, groups, BN: tl.constexpr, BK: tl.constexpr,
          FORM: tl.constexpr, GROUP: tl.constexpr, HEIGHT: tl.constexpr, XGROUP: tl.constexpr, EVEN: tl.constexpr,
          WIDEN: tl.constexpr):  # fmt: skip
    """The product over BK columns from k on, under their scales (those of whole rows come last): [BN, BM].

    rows: int64 [BN], of all experts' weights.
    """
    cols = k + tl.arange(0, BK)
    if EVEN:
        x = tl.load(x_at + k)
    else:
        x = tl.load(x_at + k, mask=(cols < K)[:, None], other=0.0)
    if FORM == 1:
        w = eight_bits(w_ptr, scale_ptr, zero_ptr, rows, k, K, groups, BN, BK, GROUP).to(x.dtype)
        part = tl.dot(w, x, out_dtype=tl.float32, input_precision="ieee")
    else:
        if EVEN:
            w = tl.load(w_ptr + rows[:, None] * K + cols[None, :])
        else:
            w = tl.load(w_ptr + rows[:, None] * K + cols[None, :], mask=(cols < K)[None, :], other=0.0)
        if WIDEN:
            w = w.to(tl.float32)
            x = x.to(tl.float32)
        elif FORM == 2:
            w = w.to(x.dtype)
        part = tl.dot(w, x, out_dtype=tl.float32, input_precision="ieee")
        if GROUP > 0:
            part = part * tl.load(scale_ptr + rows // HEIGHT * groups + k // GROUP)[:, None]
        if XGROUP > 0:
            part = part * xs[None, :]
    return part


@triton.jit(do_not_specialize=["P"])
def _expert_eight_bits(x_ptr, x_row, xs_ptr, x_groups, w_ptr, scale_ptr, zero_ptr, row_scale_ptr, groups, bias_ptr,
                       out_ptr, pairs_ptr, contents_ptr, P, N, K, tiles, SHARED: tl.constexpr, BM: tl.constexpr,
                       BN: tl.constexpr, BK: tl.constexpr, FORM: tl.constexpr, GROUP: tl.constexpr,
                       HEIGHT: tl.constexpr, XGROUP: tl.constexpr, STATIC: tl.constexpr, ROW_SCALE: tl.constexpr,
                       BIAS: tl.constexpr, GATE: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr,
                       PDL: tl.constexpr):  # fmt: skip
    """out[pair, n] for the BM pairs of a block and BN outputs of its expert; with a gate rows n and N + n together."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tile, block = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    expert, count = block_of(contents_ptr, block)
    if count > 0:
        pair, rows = rows_of(pairs_ptr, block, count, P, BM, SHARED)
        n = tile * BN + tl.arange(0, BN)
        HALVES: tl.constexpr = 2 if GATE > 0 else 1
        first = expert.to(tl.int64) * (N * HALVES)
        near = first + tl.minimum(n, N - 1)
        x_at = x_ptr + rows.to(tl.int64)[None, :] * x_row + tl.arange(0, BK)[:, None]
        acc = tl.zeros([BN, BM], tl.float32)
        acc2 = tl.zeros([BN, BM], tl.float32)
        xs = tl.zeros([BM], tl.float32)
        for k in range(0, K, BK):
            if XGROUP > 0:
                xs = tl.load(xs_ptr + rows.to(tl.int64) * x_groups + k // XGROUP)
            acc += _part(x_at, xs, w_ptr, scale_ptr, zero_ptr, near, k, K, groups, BN, BK, FORM, GROUP, HEIGHT,
                         XGROUP, EVEN, WIDEN)  # fmt: skip
            if GATE > 0:
                acc2 += _part(x_at, xs, w_ptr, scale_ptr, zero_ptr, near + N, k, K, groups, BN, BK, FORM, GROUP,
                              HEIGHT, XGROUP, EVEN, WIDEN)  # fmt: skip
        if ROW_SCALE:
            acc = acc * tl.load(row_scale_ptr + near)[:, None]
            if GATE > 0:
                acc2 = acc2 * tl.load(row_scale_ptr + near + N)[:, None]
        if FORM == 0 and XGROUP == 0:
            factor = tl.load(xs_ptr + (rows * 0 if STATIC else rows))[None, :]
            acc = acc * factor
            acc2 = acc2 * factor
        store(acc, acc2, first, n, pair, bias_ptr, out_ptr, P, N, BIAS, GATE)


def expert_eight_bits(
    x: Tensor,
    weight: EightBitWeight,
    plan: ExpertPlan,
    *,
    x_scale: Tensor | None = None,
    x_group: int = 0,
    bias: Tensor | None = None,
    gate: str | None = None,
    out_dtype: torch.dtype,
    shape: ProductShape | None = None,
) -> Tensor:
    """``expert_linear`` over weights of 8 bits, in ``out_dtype``.

    Args:
        x: [T or T * k, K], float8_e4m3fn for FP8, else 16 or 32 bits.
        weight: [E * N, K].
        x_scale: float32 [rows, 1], [rows, K / x_group] or a scalar, for FP8.
    """
    assert x.stride(1) == 1 and weight.codes.is_contiguous()
    assert plan.pairs is not None and plan.contents is not None
    k = weight.codes.shape[1]
    n = weight.codes.shape[0] // plan.num_experts // (1 if gate is None else 2)
    out = torch.empty(plan.num_pairs, n, dtype=out_dtype, device=x.device)
    shape = shape or eight_bit_shape(
        x.device, plan.block, plan.contents.numel(), gate is not None, weight.form == FP8
    )
    bk, tiles = _step_columns(weight, shape, x_group), triton.cdiv(n, shape.bn)
    inputs, flags = launch_inputs(x, weight, x_scale, x_group)
    _expert_eight_bits[(tiles * plan.contents.numel(),)](
        *inputs, weight.scale if bias is None else bias, out, plan.pairs, plan.contents, plan.num_pairs, n, k, tiles,
        SHARED=plan.num_pairs // x.shape[0], BM=plan.block, BN=shape.bn, BK=bk, BIAS=bias is not None,
        GATE=GATES[gate], EVEN=k % bk == 0, WIDEN=INTERPRETED, **flags,
        **launch_options(x.device, shape.warps, shape.stages),
    )  # fmt: skip
    return out


def _step_columns(weight: EightBitWeight, shape: ProductShape, x_group: int) -> int:
    """Columns of a step: those of FP8 share their scales, those of integers are whole groups or lie in one."""
    k, group, bk = weight.codes.shape[1], weight.group, shape.bk
    if weight.form == INT8:
        assert group % bk == 0 or bk % group == 0 or group >= k, (group, bk)
        return bk
    step = min(bk, x_group or bk, group or bk)
    assert not group or group % step == 0 or group >= k, (group, step)
    return step
