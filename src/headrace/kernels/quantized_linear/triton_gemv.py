"""One row times FP8 weights on GPUs: a sum of products in float32, four weights a register.

Nothing is rounded here but the result: a single row has no use for the tensor cores' FP8 products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.kernels.launch import INTERPRETED, launch_options
from headrace.kernels.linear.triton_parts import GATES, apply_gate
from headrace.kernels.linear.tuning import GemvShape
from headrace.kernels.quantized_linear.tuning import gemv_shape

__all__ = ["fp8_gemv"]


@triton.jit
def _four(w, PLAIN: tl.constexpr):
    """int32 words of four E4M3 numbers -> four float32, the first from the lowest byte."""
    if PLAIN:
        w0 = (w & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        w1 = ((w >> 8) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        w2 = ((w >> 16) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        w3 = ((w >> 24) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            """
            {
            .reg .b16 low, high, a, b;
            .reg .b32 pair;
            mov.b32 {low, high}, $4;
            cvt.rn.f16x2.e4m3x2 pair, low;
            mov.b32 {a, b}, pair;
            cvt.f32.f16 $0, a;
            cvt.f32.f16 $1, b;
            cvt.rn.f16x2.e4m3x2 pair, high;
            mov.b32 {a, b}, pair;
            cvt.f32.f16 $2, a;
            cvt.f32.f16 $3, b;
            }
            """,
            "=&r,=&r,=&r,=&r,r",
            [w],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    return w0, w1, w2, w3


@triton.jit
def _vectors(x_ptr, at, ok, EVEN: tl.constexpr):
    """x at 4 ``at`` + 0, 1, 2, 3, float32. bfloat16 is loaded four numbers at a time."""
    if x_ptr.dtype.element_ty == tl.bfloat16:
        wide = x_ptr.to(tl.pointer_type(tl.int64))
        if EVEN:
            v = tl.load(wide + at)
        else:
            v = tl.load(wide + at, mask=ok, other=0)
        low, high = v.to(tl.int32), (v >> 32).to(tl.int32)
        x0 = (low << 16).to(tl.float32, bitcast=True)
        x1 = (low & -65536).to(tl.float32, bitcast=True)
        x2 = (high << 16).to(tl.float32, bitcast=True)
        x3 = (high & -65536).to(tl.float32, bitcast=True)
    else:
        x0 = tl.load(x_ptr + 4 * at, mask=ok, other=0.0).to(tl.float32)
        x1 = tl.load(x_ptr + 4 * at + 1, mask=ok, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + 4 * at + 2, mask=ok, other=0.0).to(tl.float32)
        x3 = tl.load(x_ptr + 4 * at + 3, mask=ok, other=0.0).to(tl.float32)
    return x0, x1, x2, x3


@triton.jit
def _words(w_at, ok, EVEN: tl.constexpr):
    if EVEN:
        w = tl.load(w_at)
    else:
        w = tl.load(w_at, mask=ok, other=0)
    return w


@triton.jit
def _add(acc, w, x0, x1, x2, x3, PLAIN: tl.constexpr):
    w0, w1, w2, w3 = _four(w, PLAIN)
    acc += w0 * x0[None, :]
    acc += w1 * x1[None, :]
    acc += w2 * x2[None, :]
    acc += w3 * x3[None, :]
    return acc


@triton.jit
def _fp8_gemv(x_ptr, w_ptr, scale_ptr, out_ptr, gain_ptr, bias_ptr, res_ptr, N, WORDS, eps,
              BN: tl.constexpr, BW: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr,
              RESIDUAL: tl.constexpr, EVEN: tl.constexpr, PLAIN: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """out[n] = scale[n] sum_k x[k] w[n, k] for BN rows, BW words a load; with a gate rows n and N + n together."""
    if PDL:
        gdc_launch_dependents()
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    near = tl.minimum(rows, N - 1)
    cols = tl.arange(0, BW)
    at = w_ptr + near.to(tl.int64)[:, None] * WORDS + cols[None, :]
    above = at + N.to(tl.int64) * WORDS
    w = _words(at, cols[None, :] < WORDS, EVEN)
    w2 = w
    if GATE > 0:
        w2 = _words(above, cols[None, :] < WORDS, EVEN)
    if PDL:
        gdc_wait()
    acc = tl.zeros([BN, BW], tl.float32)
    acc2 = tl.zeros([BN, BW], tl.float32)
    squares = tl.zeros([BW], tl.float32)
    for k in range(0, WORDS, BW):
        x0, x1, x2, x3 = _vectors(x_ptr, k + cols, k + cols < WORDS, EVEN)
        if NORM:
            squares += x0 * x0 + x1 * x1 + x2 * x2 + x3 * x3
            g0, g1, g2, g3 = _vectors(gain_ptr, k + cols, k + cols < WORDS, EVEN)
            x0, x1, x2, x3 = x0 * g0, x1 * g1, x2 * g2, x3 * g3
        acc = _add(acc, w, x0, x1, x2, x3, PLAIN)
        if GATE > 0:
            acc2 = _add(acc2, w2, x0, x1, x2, x3, PLAIN)
        if k + BW < WORDS:
            ok = k + BW + cols[None, :] < WORDS
            w = _words(at + k + BW, ok, EVEN)
            if GATE > 0:
                w2 = _words(above + k + BW, ok, EVEN)
    rs = 1.0
    if NORM:
        rs = tl.rsqrt(tl.sum(squares, 0) / (4 * WORDS) + eps)
    y = tl.sum(acc, 1) * (tl.load(scale_ptr + near) * rs)
    if BIAS:
        y += tl.load(bias_ptr + near).to(tl.float32)
    if GATE > 0:
        up = tl.sum(acc2, 1) * (tl.load(scale_ptr + N + near) * rs)
        if BIAS:
            up += tl.load(bias_ptr + N + near).to(tl.float32)
        y = apply_gate(y, GATE) * up
    if RESIDUAL:
        y += tl.load(res_ptr + near).to(tl.float32)
    tl.store(out_ptr + rows, y.to(out_ptr.dtype.element_ty), mask=rows < N)


def fp8_gemv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    norm: tuple[Tensor, float] | None = None,
    bias: Tensor | None = None,
    gate: str | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype,
    shape: GemvShape | None = None,
) -> Tensor:
    """``act(norm(x) @ (weight * scale).T + bias) + residual`` of one row.

    Args:
        x: [1, K], K a multiple of 4.
        weight: float8_e4m3fn [N, K]; scale: float32 [N].
        norm: gain [K] and eps of an RMS norm of x.
        gate: the first N / 2 outputs go through it and multiply the others.
    """
    rows, k = weight.shape
    n = rows // (1 if gate is None else 2)
    assert x.shape == (1, k) and k % 4 == 0 and x.stride(1) == 1 and weight.is_contiguous()
    shape = shape or gemv_shape(x.device, rows, k, gate is not None)
    bw = shape.bk // 4
    gain, eps = norm if norm is not None else (x, 0.0)
    out = torch.empty(1, n, dtype=out_dtype, device=x.device)
    _fp8_gemv[(triton.cdiv(n, shape.bn),)](
        x, weight.view(torch.int32), scale, out, gain, x if bias is None else bias, x if residual is None else residual,
        n, k // 4, eps, BN=shape.bn, BW=bw, NORM=norm is not None, BIAS=bias is not None, GATE=GATES[gate],
        RESIDUAL=residual is not None, EVEN=k // 4 % bw == 0, PLAIN=INTERPRETED,
        **launch_options(x.device, shape.warps, shape.stages),
    )  # fmt: skip
    return out
