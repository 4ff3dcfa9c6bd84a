"""Linear maps of few rows on GPUs: as fast as the weights can be read.

One row is a multiply-and-sum kernel. Two to 64 rows run on the tensor cores with the weights on the wide side and
the batch on the narrow side of the product; K is split over programs where N alone does not fill the device, and
the last program to arrive adds the parts in order (so results do not depend on timing). The RMS norm before the
product needs no kernel of its own: the gain multiplies x on its way in, and the row's scale the sums at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.kernels.launch import launch_options
from headrace.kernels.linear.triton_fixed import fixed_linear
from headrace.kernels.linear.triton_parts import (
    GATES,
    SCRATCH,
    apply_gate,
    ask_l2,
    finish,
    gather_parts,
    tell_largest,
)
from headrace.kernels.linear.tuning import GemvShape, Shape, gemv_shape, skinny_shape
from headrace.kernels.step.triton import reduce_best

__all__ = ["argmax_linear", "fixed_linear", "small_linear"]


@triton.jit
def _gemv(x_ptr, w_ptr, out_ptr, gain_ptr, bias_ptr, res_ptr, best_ptr, N, K, eps,
          BN: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr,
          RESIDUAL: tl.constexpr, ARGMAX: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """out[n] = sum_k x[k] w[n, k] for BN rows; with a gate rows n and N + n together, N counting one half."""
    if PDL:
        gdc_launch_dependents()
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    cols = tl.arange(0, BK)
    row_ok = (rows < N)[:, None]
    at = w_ptr + rows.to(tl.int64)[:, None] * K + cols[None, :]
    ok = row_ok & (cols[None, :] < K)
    if EVEN:
        w = tl.load(at)
    else:
        w = tl.load(at, mask=ok, other=0.0)
    w2 = w
    if GATE > 0:
        w2 = tl.load(at + N.to(tl.int64) * K, mask=ok, other=0.0)
    if PDL:
        gdc_wait()
    acc = tl.zeros([BN, BK], tl.float32)
    acc2 = tl.zeros([BN, BK], tl.float32)
    squares = tl.zeros([BK], tl.float32)
    for k in range(0, K, BK):
        x = tl.load(x_ptr + k + cols, mask=k + cols < K, other=0.0).to(tl.float32)
        if NORM:
            squares += x * x
            x = x * tl.load(gain_ptr + k + cols, mask=k + cols < K, other=0.0).to(tl.float32)
        acc += w.to(tl.float32) * x[None, :]
        if GATE > 0:
            acc2 += w2.to(tl.float32) * x[None, :]
        if k + BK < K:
            ok = row_ok & (k + BK + cols[None, :] < K)
            if EVEN:
                w = tl.load(at + k + BK)
            else:
                w = tl.load(at + k + BK, mask=ok, other=0.0)
            if GATE > 0:
                w2 = tl.load(at + N.to(tl.int64) * K + k + BK, mask=ok, other=0.0)
    y = tl.sum(acc, 1)
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, 0) / K + eps)
        y = y * scale
    if BIAS:
        y += tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)
    if GATE > 0:
        up = tl.sum(acc2, 1) * scale
        if BIAS:
            up += tl.load(bias_ptr + N + rows, mask=rows < N, other=0.0).to(tl.float32)
        y = apply_gate(y, GATE) * up
    if RESIDUAL:
        y += tl.load(res_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)
    if ARGMAX:
        bad = (y != y) | (y == float("inf"))
        y = tl.where(rows < N, tl.where(bad, float("inf"), y), float("-inf"))
        top = tl.max(y, 0)
        tl.store(out_ptr + tl.program_id(0), top)
        tl.store(best_ptr + tl.program_id(0), tl.min(tl.where(y == top, rows, 2147483647), 0))
    else:
        tl.store(out_ptr + rows, y.to(out_ptr.dtype.element_ty), mask=rows < N)


@triton.jit
def _skinny(x_ptr, x_row, w_ptr, out_ptr, gain_ptr, bias_ptr, res_ptr, best_ptr, parts_ptr, arrivals_ptr, M, N, K, eps,
            BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, NORM: tl.constexpr,
            BIAS: tl.constexpr, GATE: tl.constexpr, RESIDUAL: tl.constexpr, ARGMAX: tl.constexpr,
            EVEN: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """out[m, n] for all M rows and BN columns, over one of SPLITS ranges of K."""
    if PDL:
        gdc_launch_dependents()
    tile = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    rows = tile * BN + tl.arange(0, BN)
    near = tl.minimum(rows, N - 1)  # rows past N repeat the last one: no mask on the large loads
    m = tl.arange(0, BM)
    m_ok = m < M
    cols = tl.arange(0, BK)
    span = (K + SPLITS * BK - 1) // (SPLITS * BK) * BK
    lo = split * span
    hi = tl.minimum(lo + span, K)
    w_at = w_ptr + near.to(tl.int64)[:, None] * K + cols[None, :]
    gain = tl.zeros([BK], tl.float32)
    if NORM:
        gain = tl.load(gain_ptr + lo + cols, mask=lo + cols < K, other=0.0).to(tl.float32)
    if PDL:
        ask_l2(w_ptr, near, lo, hi, N, K, BK, 4, GATE)
        gdc_wait()
    # Rows past M repeat the last one too; their results are not stored.
    x_at = x_ptr + tl.minimum(m, M - 1)[None, :] * x_row + cols[:, None]
    acc = tl.zeros([BN, BM], tl.float32)
    acc2 = tl.zeros([BN, BM], tl.float32)
    squares = tl.zeros([BM], tl.float32)
    for k in range(lo, hi, BK):
        k_ok = k + cols < K
        if EVEN:
            w = tl.load(w_at + k)
            x = tl.load(x_at + k)
        else:
            w = tl.load(w_at + k, mask=k_ok[None, :], other=0.0)
            x = tl.load(x_at + k, mask=k_ok[:, None], other=0.0)
        if NORM:
            # The next gain is on its way while this one is used.
            following = tl.load(gain_ptr + k + BK + cols, mask=k + BK + cols < K, other=0.0).to(tl.float32)
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, 0)
            x = (wide * gain[:, None]).to(x.dtype)
            gain = following
        acc = tl.dot(w, x, acc, out_dtype=tl.float32, input_precision="ieee")
        if GATE > 0:
            if EVEN:
                w2 = tl.load(w_at + N.to(tl.int64) * K + k)
            else:
                w2 = tl.load(w_at + N.to(tl.int64) * K + k, mask=k_ok[None, :], other=0.0)
            acc2 = tl.dot(w2, x, acc2, out_dtype=tl.float32, input_precision="ieee")
    last = True
    if SPLITS > 1:
        if NORM:  # behind the parts
            TALL: tl.constexpr = 2 * BN if GATE > 0 else BN
            sums = parts_ptr + tl.num_programs(0).to(tl.int64) * (TALL * BM) + tile * (SPLITS * BM) + m
            tl.store(sums + split * BM, squares)
        acc, acc2, last = gather_parts(
            acc, acc2, parts_ptr, arrivals_ptr, tile, split, m, BM, BN, SPLITS, GATE
        )
        if NORM and last:
            squares = tl.zeros([BM], tl.float32)
            for i in tl.static_range(SPLITS):
                squares += tl.load(sums + i * BM, cache_modifier=".cg")
    if last:
        if NORM:
            scale = tl.rsqrt(squares / K + eps)[None, :]
            acc = acc * scale
            acc2 = acc2 * scale
        if ARGMAX:
            tell_largest(acc, rows, m, m_ok, out_ptr, best_ptr, N, tile, tl.num_programs(0) // SPLITS)
        else:
            finish(acc, acc2, rows, near, m, m_ok, bias_ptr, res_ptr, out_ptr, N, BIAS, GATE, RESIDUAL)


def _launch(
    x: Tensor, weight: Tensor, out: Tensor, best: Tensor | None, shape: Shape, *,
    norm: tuple[Tensor, float] | None, bias: Tensor | None, gate: str | None, residual: Tensor | None,
) -> None:  # fmt: skip
    num_rows, k = x.shape
    n = weight.shape[0] // (1 if gate is None else 2)
    gain, eps = norm if norm is not None else (x, 0.0)
    flags = {
        "NORM": norm is not None, "BIAS": bias is not None, "GATE": GATES[gate], "RESIDUAL": residual is not None,
        "ARGMAX": best is not None,
    }  # fmt: skip
    bias = x if bias is None else bias
    residual = x if residual is None else residual
    best = x if best is None else best
    tiles = triton.cdiv(n, shape.bn)
    options = launch_options(x.device, shape.warps, shape.stages)
    if isinstance(shape, GemvShape):
        even = n % shape.bn == 0 and k % shape.bk == 0
        _gemv[(tiles,)](x, weight, out, gain, bias, residual, best, n, k, eps, BN=shape.bn, BK=shape.bk, EVEN=even,
                        **flags, **options)  # fmt: skip
        return
    height = (1 if gate is None else 2) * shape.bn + 1
    parts, arrivals = x, x
    if shape.splits > 1:
        parts, arrivals = SCRATCH.get(x.device, tiles * shape.splits * height * shape.bm, tiles)
    assert num_rows <= shape.bm
    _skinny[(tiles * shape.splits,)](
        x, x.stride(0), weight, out, gain, bias, residual, best, parts, arrivals, num_rows, n, k, eps,
        BM=shape.bm, BN=shape.bn, BK=shape.bk, SPLITS=shape.splits, EVEN=k % shape.bk == 0, **flags,
        **options,
    )  # fmt: skip


def _shape(x: Tensor, weight: Tensor, gate: str | None) -> Shape:
    num_rows, k = x.shape
    n = weight.shape[0]
    if num_rows == 1:
        return gemv_shape(x.device, n, k, gate is not None)
    return skinny_shape(x.device, num_rows, n, k, gate is not None)


def small_linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm: tuple[Tensor, float] | None = None,
    bias: Tensor | None = None,
    gate: str | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    assert x.stride(1) == 1 and weight.is_contiguous() and (residual is None or residual.is_contiguous())
    n = weight.shape[0] // (1 if gate is None else 2)
    if out is None:
        out = torch.empty(x.shape[0], n, dtype=out_dtype or x.dtype, device=x.device)
    shape = _shape(x, weight, gate)
    _launch(x, weight, out, None, shape, norm=norm, bias=bias, gate=gate, residual=residual)
    return out


def argmax_linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm: tuple[Tensor, float] | None = None,
    last_tokens: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """See the package; ``last_tokens`` and ``rows`` as in kernels/step."""
    assert x.stride(1) == 1 and weight.is_contiguous()
    num_rows = x.shape[0]
    shape = _shape(x, weight, None)
    tiles = triton.cdiv(weight.shape[0], shape.bn)
    top = torch.empty(num_rows, tiles, dtype=torch.float32, device=x.device)
    best = torch.empty(num_rows, tiles, dtype=torch.int32, device=x.device)
    _launch(x, weight, top, best, shape, norm=norm, bias=None, gate=None, residual=None)
    return reduce_best(top, best, last_tokens=last_tokens, rows=rows)
