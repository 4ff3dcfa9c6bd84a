"""Linear maps of few rows over weights of few bits on GPUs: as fast as the weights can be read.

As in kernels/linear the weights are on the wide side of the product and the batch on the narrow one, and K is split
over programs where N alone does not fill the device; the last program to arrive adds the parts in order.
FP8 weights meet FP8 activations, so nothing is converted; 8-bit integers are decoded in registers to the activations'
type (4-bit codes: triton_codes.py). FP8 sums leave the tensor core's own imprecise accumulator every 128 columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.kernels.launch import INTERPRETED, launch_options, prefetch_l2
from headrace.kernels.linear.triton_parts import GATES as _GATES
from headrace.kernels.linear.triton_parts import SCRATCH as _SCRATCH
from headrace.kernels.quantized_linear import tuning
from headrace.kernels.quantized_linear.eight_bits import (
    FP8,
    INT8,
    EightBitWeight,
    launch_inputs,
    reads_groups,
)
from headrace.kernels.quantized_linear.triton_parts import FP8_MAX, finish, gather_parts
from headrace.kernels.quantized_linear.tuning import PackedShape, packed_shape, padded_rows

__all__ = [
    "FP8",
    "INT8",
    "EightBitWeight",
    "dequantize",
    "eight_bits",
    "quantize_rows",
    "small_product",
]

MAX_ROWS = 64


@triton.jit
def _quantize_rows(x_ptr, x_row, gain_ptr, codes_ptr, scale_ptr, K, groups, eps,
                   GROUP: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One row; GROUP 0: one scale, else one for each GROUP columns."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BK)
    rs = 1.0
    if NORM:
        squares = tl.zeros([BK], tl.float32)
        for k in range(0, K, BK):
            x = tl.load(x_ptr + row * x_row + k + cols, mask=k + cols < K, other=0.0).to(tl.float32)
            squares += x * x
        rs = tl.rsqrt(tl.sum(squares, 0) / K + eps)
    scale = 1.0
    if GROUP == 0:
        top = tl.zeros([BK], tl.float32)
        for k in range(0, K, BK):
            x = _normed(x_ptr + row * x_row, gain_ptr, k + cols, K, rs, NORM)
            top = tl.maximum(top, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
        scale = tl.maximum(tl.max(top, 0), 1e-10) / FP8_MAX
        tl.store(scale_ptr + row, scale)
    for k in range(0, K, BK):
        x = _normed(x_ptr + row * x_row, gain_ptr, k + cols, K, rs, NORM)
        if GROUP > 0:
            tiles = x.reshape(BK // GROUP, GROUP)
            each = tl.maximum(tl.max(tl.abs(tiles), 1), 1e-10) / FP8_MAX
            g = k // GROUP + tl.arange(0, BK // GROUP)
            tl.store(scale_ptr + row * groups + g, each, mask=g < groups)
            y = (tiles / each[:, None]).reshape(BK)
        else:
            y = x / scale
        y = tl.clamp(y, -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
        tl.store(codes_ptr + row * K + k + cols, y.to(codes_ptr.dtype.element_ty), mask=k + cols < K)


@triton.jit
def _quantize_row(x_ptr, x_row, gain_ptr, codes_ptr, scale_ptr, K, eps, BLOCK: tl.constexpr, NORM: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """One row with one scale, read once."""
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    ok = cols < K
    if NORM:
        gain = tl.load(gain_ptr + cols, mask=ok, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + row * x_row + cols, mask=ok, other=0.0)
    y = x.to(tl.float32)
    if NORM:
        y = (y * tl.rsqrt(tl.sum(y * y, 0) / K + eps) * gain).to(x.dtype).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(y), 0), 1e-10) / FP8_MAX
    tl.store(scale_ptr + row, scale)
    y = tl.clamp(y / scale, -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
    tl.store(codes_ptr + row * K + cols, y.to(codes_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _normed(x_ptr, gain_ptr, cols, K, rs, NORM: tl.constexpr):
    """Columns of a row after its norm (rounded to x's type, as a norm of its own would), float32."""
    x = tl.load(x_ptr + cols, mask=cols < K, other=0.0)
    y = x.to(tl.float32)
    if NORM:
        gain = tl.load(gain_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)
        y = (y * rs * gain).to(x.dtype).to(tl.float32)
    return y


@triton.jit
def eight_bits(w_ptr, scale_ptr, zero_ptr, rows, k, K, groups, BN: tl.constexpr, BK: tl.constexpr,
                GROUP: tl.constexpr):  # fmt: skip
    """float32 [BN, BK] of 8-bit codes from column k on."""
    COUNT: tl.constexpr = BK // GROUP if GROUP < BK else 1
    g = k // GROUP + tl.arange(0, COUNT)
    at = rows.to(tl.int64)[:, None] * groups + g[None, :]
    ok = g[None, :] < groups
    cols = k + tl.arange(0, BK)
    codes = tl.load(w_ptr + rows.to(tl.int64)[:, None] * K + cols[None, :], mask=cols[None, :] < K, other=0)
    scale = _spread(tl.load(scale_ptr + at, mask=ok, other=0.0), BN, COUNT, BK // COUNT)
    zero = _spread(tl.load(zero_ptr + at, mask=ok, other=0.0), BN, COUNT, BK // COUNT)
    return (codes.to(tl.float32) - zero) * scale


@triton.jit
def _spread(x, BN: tl.constexpr, COUNT: tl.constexpr, EACH: tl.constexpr):
    """[BN, COUNT] -> [BN, COUNT * EACH], each column EACH times."""
    return tl.broadcast_to(x[:, :, None], (BN, COUNT, EACH)).reshape(BN, COUNT * EACH)


@triton.jit
def _step(acc, x_ptr, x_row, xs, w_ptr, scale_ptr, zero_ptr, rows, m, m_ok, k, K, groups,
          BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, HEIGHT: tl.constexpr,
          XGROUP: tl.constexpr, FORM: tl.constexpr, WIDEN: tl.constexpr):  # fmt: skip
    """acc [BN, BM] plus the product over BK columns from k on."""
    cols = k + tl.arange(0, BK)
    if FORM == 0:
        w = tl.load(w_ptr + rows.to(tl.int64)[:, None] * K + cols[None, :], mask=cols[None, :] < K, other=0.0)
        x_at = x_ptr + m[None, :].to(tl.int64) * x_row + cols[:, None]
        x = tl.load(x_at, mask=(cols[:, None] < K) & m_ok[None, :], other=0.0)
        if WIDEN:
            w = w.to(tl.float32)
            x = x.to(tl.float32)
        if GROUP > 0 or XGROUP > 0:
            part = tl.dot(w, x, out_dtype=tl.float32, input_precision="ieee")
            if GROUP > 0:
                ws = tl.load(scale_ptr + (rows // HEIGHT).to(tl.int64) * groups + k // GROUP)
                part = part * ws[:, None]
            if XGROUP > 0:
                part = part * xs[None, :]
            acc += part
        elif WIDEN:
            acc = tl.dot(w, x, acc, out_dtype=tl.float32, input_precision="ieee")
        else:
            acc = tl.dot(w, x, acc, out_dtype=tl.float32, max_num_imprecise_acc=128)
    else:
        w = eight_bits(w_ptr, scale_ptr, zero_ptr, rows, k, K, groups, BN, BK, GROUP)
        x_at = x_ptr + m[None, :].to(tl.int64) * x_row + cols[:, None]
        x = tl.load(x_at, mask=(cols[:, None] < K) & m_ok[None, :], other=0.0)
        acc = tl.dot(w.to(x.dtype), x, acc, out_dtype=tl.float32, input_precision="ieee")
    return acc


@triton.jit
def _small(x_ptr, x_row, xs_ptr, x_groups, w_ptr, scale_ptr, zero_ptr, row_scale_ptr, groups, bias_ptr, res_ptr,
           out_ptr, parts_ptr, arrivals_ptr, M, N, K,
           BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, FORM: tl.constexpr,
           GROUP: tl.constexpr, HEIGHT: tl.constexpr, XGROUP: tl.constexpr, ROW_SCALE: tl.constexpr,
           STATIC: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr, RESIDUAL: tl.constexpr,
           WIDEN: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """out[m, n] for all M rows and BN columns, over one of SPLITS ranges of K; with a gate rows n and N + n."""
    if PDL:
        gdc_launch_dependents()
    tile = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    rows = tile * BN + tl.arange(0, BN)
    near = tl.minimum(rows, N - 1)  # rows past N repeat the last one
    m = tl.arange(0, BM)
    m_ok = m < M
    span = (K + SPLITS * BK - 1) // (SPLITS * BK) * BK
    lo = split * span
    hi = tl.minimum(lo + span, K)
    if PDL:
        lines = tl.arange(0, max(BK // 128, 1)) * 128
        ahead = w_ptr + near.to(tl.int64)[:, None] * K
        for k in range(lo, tl.minimum(hi, lo + 4 * BK), BK):
            at = ahead + tl.minimum(k + lines, K - 1)[None, :]
            prefetch_l2(at)
            if GATE > 0:
                prefetch_l2(at + N.to(tl.int64) * K)
        gdc_wait()
    acc = tl.zeros([BN, BM], tl.float32)
    acc2 = tl.zeros([BN, BM], tl.float32)
    xs = tl.zeros([BM], tl.float32)
    if XGROUP > 0:
        xs = tl.load(xs_ptr + m * x_groups + lo // XGROUP, mask=m_ok & (lo < K), other=0.0)
    for k in range(lo, hi, BK):
        following = xs
        if XGROUP > 0:  # on its way while this one is used
            to = k + BK
            following = tl.load(xs_ptr + m * x_groups + to // XGROUP, mask=m_ok & (to < hi), other=0.0)
        acc = _step(acc, x_ptr, x_row, xs, w_ptr, scale_ptr, zero_ptr, near, m, m_ok, k, K, groups,
                    BM, BN, BK, GROUP, HEIGHT, XGROUP, FORM, WIDEN)  # fmt: skip
        if GATE > 0:
            acc2 = _step(acc2, x_ptr, x_row, xs, w_ptr, scale_ptr, zero_ptr, near + N, m, m_ok, k, K,
                         groups, BM, BN, BK, GROUP, HEIGHT, XGROUP, FORM, WIDEN)  # fmt: skip
        xs = following
    last = True
    if SPLITS > 1:
        acc, acc2, last = gather_parts(
            acc, acc2, parts_ptr, arrivals_ptr, tile, split, m, BM, BN, SPLITS, GATE
        )
    if last:
        if ROW_SCALE:
            acc = acc * tl.load(row_scale_ptr + near)[:, None]
            if GATE > 0:
                acc2 = acc2 * tl.load(row_scale_ptr + near + N)[:, None]
        if FORM == 0 and XGROUP == 0:
            factor = tl.load(xs_ptr + (m * 0 if STATIC else m), mask=m_ok, other=0.0)[None, :]
            acc = acc * factor
            acc2 = acc2 * factor
        finish(acc, acc2, rows, near, m, m_ok, bias_ptr, res_ptr, out_ptr, N, BIAS, GATE, RESIDUAL)


@triton.jit
def _dequantize(w_ptr, scale_ptr, zero_ptr, groups, out_ptr, N, K, BN: tl.constexpr, BK: tl.constexpr,
                GROUP: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    near = tl.minimum(rows, N - 1)
    k = tl.program_id(1) * BK
    value = eight_bits(w_ptr, scale_ptr, zero_ptr, near, k, K, groups, BN, BK, GROUP)
    cols = k + tl.arange(0, BK)
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * K + cols[None, :], value.to(out_ptr.dtype.element_ty),
             mask=(rows < N)[:, None] & (cols[None, :] < K))  # fmt: skip


def quantize_rows(
    x: Tensor, *, group: int | None = None, norm: tuple[Tensor, float] | None = None
) -> tuple[Tensor, Tensor]:
    """See the package."""
    rows, k = x.shape
    assert x.stride(1) == 1
    groups = 1 if group is None else triton.cdiv(k, group)
    codes = torch.empty(rows, k, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, groups, dtype=torch.float32, device=x.device)
    gain, eps = norm if norm is not None else (x, 0.0)
    block = triton.next_power_of_2(k)
    if group is None and 512 <= block <= 16384:
        _quantize_row[(rows,)](
            x, x.stride(0), gain, codes, scale, k, eps, BLOCK=block, NORM=norm is not None,
            **launch_options(x.device, min(16, block // 512), 1),
        )  # fmt: skip
        return codes, scale
    bk = min(4096, max(triton.next_power_of_2(k), group or 1))
    assert group is None or bk % group == 0
    options = launch_options(x.device, 4 if bk >= 1024 else 1, 1)
    _quantize_rows[(rows,)](
        x, x.stride(0), gain, codes, scale, k, groups, eps, GROUP=group or 0, BK=bk, NORM=norm is not None, **options
    )  # fmt: skip
    return codes, scale


def small_product(
    x: Tensor,
    weight: EightBitWeight,
    *,
    x_scale: Tensor | None = None,
    x_group: int = 0,
    bias: Tensor | None = None,
    gate: str | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype,
    shape: PackedShape | None = None,
) -> Tensor:
    """``act(x @ weight.T + bias) + residual`` with float32 sums, rounded once at the end.

    Args:
        x: [M, K], M at most MAX_ROWS; float8_e4m3fn for FP8, else 16 bits.
        weight: FP8 or INT8.
        x_scale: float32 [M, 1] or [M, K / x_group], or a scalar (static), for FP8.
        gate: the first N / 2 outputs go through it and multiply the others.
    """
    num_rows, k = x.shape
    assert num_rows <= MAX_ROWS and x.stride(1) == 1 and weight.codes.is_contiguous()
    high, fp8 = weight.codes.shape[0], weight.form == FP8
    if shape is None and fp8 and weight.row_scale is not None and x_scale is not None and not x_group:
        ring = tuning.fp8_ring_shape(x.device, num_rows, high, weight.codes.shape[1], gate is not None)
        if ring is not None:
            from headrace.kernels.quantized_linear import gluon_ring

            if gluon_ring.covers(x, weight.codes, ring):
                return gluon_ring.ring_product(
                    x, weight.codes, weight.row_scale, x_scale, bias=bias, gate=gate, residual=residual,
                    out_dtype=out_dtype, shape=ring,
                )  # fmt: skip
    shape = shape or packed_shape(x.device, num_rows, high, k, fp8, gate is not None)
    n = high // (1 if gate is None else 2)
    bm, tiles = max(16, padded_rows(num_rows)), triton.cdiv(n, shape.bn)
    out = torch.empty(num_rows, n, dtype=out_dtype, device=x.device)
    parts = arrivals = out
    if shape.splits > 1:
        tall = (1 if gate is None else 2) * shape.bn
        parts, arrivals = _SCRATCH.get(x.device, tiles * shape.splits * tall * bm, tiles)
    inputs, flags = launch_inputs(x, weight, x_scale, x_group)
    _small[(tiles * shape.splits,)](
        *inputs, x if bias is None else bias, x if residual is None else residual, out, parts, arrivals, num_rows, n,
        k, BM=bm, BN=shape.bn, BK=_step_columns(weight, shape, x_group), SPLITS=shape.splits, BIAS=bias is not None,
        GATE=_GATES[gate], RESIDUAL=residual is not None, WIDEN=INTERPRETED, **flags,
        **launch_options(x.device, shape.warps, shape.stages),
    )  # fmt: skip
    return out


def _step_columns(weight: EightBitWeight, shape: PackedShape, x_group: int) -> int:
    """Columns of a step: those of FP8 share their scales, those of integers are whole groups or lie in one."""
    group = weight.group
    if weight.form == FP8:
        step = min(shape.bk, group or shape.bk, x_group or shape.bk)
        assert not group or group % step == 0
        return step
    whole = group >= weight.codes.shape[1] or shape.bk % group == 0 or group % shape.bk == 0
    assert group % 16 == 0 and whole, (group, shape.bk)
    return shape.bk


def dequantize(weight: Tensor, scale: Tensor, zero: Tensor, *, group: int, dtype: torch.dtype) -> Tensor:
    """8-bit integers -> [N, K] of ``dtype``, each number rounded once from float32."""
    n, k = weight.shape
    out = torch.empty(n, k, dtype=dtype, device=weight.device)
    assert reads_groups(group, k), (group, k)
    _dequantize[(triton.cdiv(n, 32), triton.cdiv(k, 128))](
        weight, scale, zero, scale.shape[1], out, n, k, BN=32, BK=128, GROUP=group, num_warps=4
    )  # fmt: skip
    return out
