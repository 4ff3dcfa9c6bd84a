"""Norms on GPUs: one program a row, one read and one write of it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.kernels.launch import launch_options

__all__ = ["add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm"]


@triton.jit
def _rms_norm(x_ptr, x_row, res_ptr, out_ptr, gain_ptr, D, eps, BLOCK: tl.constexpr, ADD: tl.constexpr,
              PDL: tl.constexpr):  # fmt: skip
    """out = norm(x), or with ADD: res += x, out = norm(res)."""
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    ok = d < D
    gain = tl.load(gain_ptr + d, mask=ok, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + row * x_row + d, mask=ok, other=0.0).to(tl.float32)
    if ADD:
        x = (x + tl.load(res_ptr + row * D + d, mask=ok, other=0.0).to(tl.float32)).to(
            res_ptr.dtype.element_ty
        )
        tl.store(res_ptr + row * D + d, x, mask=ok)
        x = x.to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps) * gain
    tl.store(out_ptr + row * D + d, y.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _layer_norm(x_ptr, x_row, res_ptr, out_ptr, gain_ptr, bias_ptr, D, eps, BLOCK: tl.constexpr,
                BIAS: tl.constexpr, ADD: tl.constexpr, KEEP: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """out = norm(x), with ADD norm(res + x); KEEP: res becomes the sum, rounded before it is normed."""
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    ok = d < D
    gain = tl.load(gain_ptr + d, mask=ok, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + row * x_row + d, mask=ok, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(res_ptr + row * D + d, mask=ok, other=0.0).to(tl.float32)
    if KEEP:
        total = x.to(res_ptr.dtype.element_ty)
        tl.store(res_ptr + row * D + d, total, mask=ok)
        x = total.to(tl.float32)
    x = tl.where(ok, x - tl.sum(x, 0) / D, 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps) * gain
    if BIAS:
        y += tl.load(bias_ptr + d, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * D + d, y.to(out_ptr.dtype.element_ty), mask=ok)


def _rows(x: Tensor) -> Tensor:
    """x as [R, D] with contiguous rows."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _options(x: Tensor) -> tuple[int, dict[str, object]]:
    block = triton.next_power_of_2(x.shape[-1])
    return block, launch_options(x.device, max(1, min(16, block // 512)), 1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows = _rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block, options = _options(x)
    _rms_norm[(rows.shape[0],)](rows, rows.stride(0), rows, out, weight, rows.shape[1], eps, BLOCK=block, ADD=False,
                                **options)  # fmt: skip
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows = _rows(x)
    residual = residual.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block, options = _options(x)
    _rms_norm[(rows.shape[0],)](rows, rows.stride(0), residual, out, weight, rows.shape[1], eps, BLOCK=block, ADD=True,
                                **options)  # fmt: skip
    return out, residual


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> Tensor:
    return _launch_layer_norm(x, residual, weight, bias, eps, keep=False)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    residual = residual.contiguous()
    return _launch_layer_norm(x, residual, weight, bias, eps, keep=True), residual


def _launch_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, *, keep: bool
) -> Tensor:
    rows = _rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block, options = _options(x)
    _layer_norm[(rows.shape[0],)](
        rows, rows.stride(0), rows if residual is None else residual.contiguous(), out, weight,
        weight if bias is None else bias, rows.shape[1], eps, BLOCK=block, BIAS=bias is not None,
        ADD=residual is not None, KEEP=keep, **options,
    )  # fmt: skip
    return out
