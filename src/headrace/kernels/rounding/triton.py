"""One program a row: read, made, measured and rounded in registers, written once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.kernels.activation.triton import ACTIVATION_CODES, activated, bias_activate
from headrace.kernels.dense.triton_product import Shape, fused_product
from headrace.kernels.launch import INTERPRETED, launch_options
from headrace.kernels.quantized_linear import triton as quantized_linear
from headrace.kernels.rounding import Format, Rounded, top

__all__ = ["activate", "gate", "linear", "norm", "rows"]


@triton.jit
def _write(y, codes_ptr, scale_ptr, row, d, D, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """Round a row (of a 16-bit type) to eight bits, integers rotated by the Hadamard matrix.

    A row with NaN or infinity gets the scale NaN, so that no number comes of it.
    """
    ok = d < D
    if TOP == 127.0:
        i = tl.arange(0, 32)
        bits = i[:, None] & i[None, :]
        bits = bits ^ (bits >> 4)
        bits = bits ^ (bits >> 2)
        bits = (bits ^ (bits >> 1)) & 1
        signs = (1 - 2 * bits).to(y.dtype)
        turned = tl.dot(tl.reshape(y, (BLOCK // 32, 32)), signs, out_dtype=tl.float32, input_precision="ieee")
        y = tl.reshape(turned, (BLOCK,)) * 0.17677669529663687
    y = y.to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(y), 0), 1e-10) / TOP + tl.sum(y * 0.0, 0)
    tl.store(scale_ptr + row, scale)
    y = tl.clamp(y / scale, -TOP, TOP)
    if TOP == 127.0:
        y = tl.floor(y + 0.5)
    tl.store(codes_ptr + row * D + d, y.to(codes_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _norm(x_ptr, x_row, res_ptr, full_ptr, codes_ptr, scale_ptr, gain_ptr, bias_ptr, D, eps, BLOCK: tl.constexpr,
          LAYER: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, KEEP: tl.constexpr, FULL: tl.constexpr,
          NORM: tl.constexpr, TOP: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    ok = d < D
    if NORM:
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
    if LAYER:
        x = tl.where(ok, x - tl.sum(x, 0) / D, 0.0)
    if NORM:
        x = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps) * gain
    if BIAS:
        x += tl.load(bias_ptr + d, mask=ok, other=0.0).to(tl.float32)
    x = x.to(full_ptr.dtype.element_ty)
    if FULL:
        tl.store(full_ptr + row * D + d, x, mask=ok)
    _write(x, codes_ptr, scale_ptr, row, d, D, TOP, BLOCK)


@triton.jit
def _activate(x_ptr, x_row, bias_ptr, codes_ptr, scale_ptr, D, NAME: tl.constexpr, GATED: tl.constexpr,
              BIAS: tl.constexpr, BLOCK: tl.constexpr, TOP: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    ok = d < D
    at = x_ptr + row * x_row + d
    y = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + d, mask=ok, other=0.0).to(tl.float32)
    y = activated(y, NAME)
    if GATED:
        up = tl.load(at + D, mask=ok, other=0.0).to(tl.float32)
        if BIAS:
            up += tl.load(bias_ptr + D + d, mask=ok, other=0.0).to(tl.float32)
        y = y * up
    y = tl.where(ok, y, 0.0).to(x_ptr.dtype.element_ty)
    _write(y, codes_ptr, scale_ptr, row, d, D, TOP, BLOCK)


def _made(x: Tensor, width: int, format: Format) -> tuple[Rounded, dict[str, Any]]:
    """Room for the result, and options of a launch."""
    kind = torch.float8_e4m3fn if format == "fp8" else torch.int8
    count = x.shape[0]
    codes = torch.empty(count, width, dtype=kind, device=x.device)
    scale = torch.empty(count, 1, dtype=torch.float32, device=x.device)
    assert format == "fp8" or width % 32 == 0
    block = triton.next_power_of_2(width)
    if format == "int8":
        block = max(block, 512)  # a dot has 16 rows at least
    options = launch_options(x.device, max(1, min(16, block // 512)), 1)
    return Rounded(codes, scale), {"BLOCK": block, "TOP": top(format), **options}


def _flat(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _launch_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    format: Format,
    *,
    layer: bool,
    full: bool,
    keep: bool,
) -> Rounded:
    x = _flat(x)
    assert residual is None or residual.is_contiguous()
    found, options = _made(x, x.shape[1], format)
    if full:
        found.full = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _norm[(x.shape[0],)](
        x, x.stride(0), x if residual is None else residual, x if found.full is None else found.full, found.codes,
        found.scale, x if weight is None else weight, x if bias is None else bias, x.shape[1], eps, LAYER=layer,
        BIAS=bias is not None, ADD=residual is not None, KEEP=keep, FULL=full, NORM=weight is not None, **options,
    )  # fmt: skip
    return found


def rows(x: Tensor, format: Format) -> Rounded:
    return _launch_norm(x, None, None, None, 0.0, format, layer=False, full=False, keep=False)


def norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    format: Format,
    *,
    layer: bool,
    full: bool = False,
    keep: bool = False,
) -> Rounded:
    return _launch_norm(x, residual, weight, bias, eps, format, layer=layer, full=full, keep=keep)


def _launch(x: Tensor, bias: Tensor | None, name: str, format: Format, gated: bool) -> Rounded:
    x = _flat(x)
    width = x.shape[1] // (2 if gated else 1)
    found, options = _made(x, width, format)
    _activate[(x.shape[0],)](
        x, x.stride(0), x if bias is None else bias, found.codes, found.scale, width, NAME=ACTIVATION_CODES[name],
        GATED=gated, BIAS=bias is not None, **options,
    )  # fmt: skip
    return found


def activate(x: Tensor, bias: Tensor | None, name: str, format: Format) -> Rounded:
    return _launch(x, bias, name, format, False)


def gate(gate_up: Tensor, bias: Tensor | None, name: str, format: Format) -> Rounded:
    return _launch(gate_up, bias, name, format, True)


def linear(
    x: Rounded,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    activation: str | None = None,
    rounds: Format | None = None,
) -> Tensor | Rounded:
    if activation is None:
        return _product(x, weight, scale, bias, dtype)
    out = _product(x, weight, scale, None, dtype)
    if rounds is not None:
        return _launch(out, bias, activation, rounds, False)
    return bias_activate(out, bias, activation)


def _product(x: Rounded, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    fp8 = weight.dtype is torch.float8_e4m3fn
    count = x.codes.shape[0]
    if fp8 and count <= quantized_linear.MAX_ROWS:
        packed = quantized_linear.EightBitWeight(quantized_linear.FP8, weight, scale, row_scale=scale)
        return quantized_linear.small_product(x.codes, packed, x_scale=x.scale, bias=bias, out_dtype=dtype)
    if fp8 and bias is None and dtype is torch.bfloat16 and not INTERPRETED:
        return torch._scaled_mm(
            x.codes,
            weight.t(),
            scale_a=x.scale,
            scale_b=scale[None, :],
            out_dtype=dtype,
            use_fast_accum=True,
        )
    # With a bias ours is the faster one: it takes no further pass (H200, 16,384 x 1,024 x 3,072: 90 us against 85).
    shape = None if INTERPRETED or count >= 2048 else Shape(64, 64, 128, warps=4)
    return fused_product(x.codes, weight, bias, scales=(x.scale, scale), out_dtype=dtype, shape=shape)
