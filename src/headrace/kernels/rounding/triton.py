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
from headrace.kernels.rounding import Bound, Format, Rounded, top

__all__ = ["activate", "gate", "linear", "norm", "rows"]


@triton.jit
def _columns(BLOCK: tl.constexpr, TOP: tl.constexpr):
    """The columns of a row as a program holds them: int32 [BLOCK]; for integers [4, BLOCK / 32, 8].

    There the 32 columns that are rotated together lie in one thread: four times eight that are loaded at once.
    """
    if TOP == 127.0:
        block = tl.arange(0, BLOCK // 32) * 32
        d = (tl.arange(0, 4) * 8)[:, None, None] + block[None, :, None] + tl.arange(0, 8)[None, None, :]
    else:
        d = tl.arange(0, BLOCK)
    return d


@triton.jit
def _sum(x, TOP: tl.constexpr):
    """Of a row as _columns has it; of one for FP8 in the order of kernels/norm."""
    if TOP == 127.0:
        return tl.sum(x)
    else:
        return tl.sum(x, 0)


@triton.jit
def _sum_difference(x, BLOCKS: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr):
    """One bit of the Hadamard transform: of the last dimension of [4, BLOCKS, 8], HIGH values above it, LOW below."""
    pairs = tl.permute(tl.reshape(x, (4, BLOCKS, HIGH, 2, LOW)), (0, 1, 2, 4, 3))
    a, b = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 2, 4, 3)), (4, BLOCKS, 8))


@triton.jit
def _rotated(x, BLOCK: tl.constexpr):
    """The Hadamard transform of blocks of 32, float32 [4, BLOCK / 32, 8], bit by bit and without leaving a thread."""
    BLOCKS: tl.constexpr = BLOCK // 32
    x = _sum_difference(x, BLOCKS, 4, 1)
    x = _sum_difference(x, BLOCKS, 2, 2)
    x = _sum_difference(x, BLOCKS, 1, 4)
    a, b = tl.split(tl.permute(tl.reshape(x, (2, 2, BLOCKS, 8)), (1, 2, 3, 0)))
    x = tl.join(a + b, a - b)  # [2, BLOCKS, 8, 2]
    a, b = tl.split(tl.permute(x, (1, 2, 3, 0)))
    x = tl.permute(tl.join(a + b, a - b), (2, 3, 0, 1))
    return tl.reshape(x, (4, BLOCKS, 8)) * 0.17677669529663687


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _write(
    y, codes_ptr, scale_ptr, row, factor, D, TOP: tl.constexpr, BLOCK: tl.constexpr, FACTOR: tl.constexpr
):
    """Round a row (float32, as _columns has it) to eight bits, integers rotated by the Hadamard matrix.

    FP8 codes are those that quantized_linear.quantize_rows makes of a row in 16 bits, which this one must be then. A
    row with NaN or infinity gets the scale NaN, so that no number comes of it. FACTOR: codes are numbers times
    ``factor``, and what is not finite is NaN.
    """
    if TOP == 127.0:
        y = _rotated(y, BLOCK)
    if FACTOR:
        y = y * factor
        y += y * 0.0
    else:
        largest = tl.reduce(tl.abs(tl.reshape(y, (BLOCK,), can_reorder=True)), 0, _larger)
        scale = tl.maximum(largest, 1e-10, propagate_nan=tl.PropagateNan.ALL) / TOP
        scale += scale * 0.0  # of infinity: NaN
        tl.store(scale_ptr + row, scale)
        if TOP == 127.0:
            y = y * (1.0 / scale)
        else:
            y = y / scale
    if TOP == 127.0:
        # Of a number so large the last bits are the nearest integer.
        codes = (y + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
        codes = tl.reshape(tl.permute(codes, (1, 0, 2)), (BLOCK // 32, 32))
        d = (tl.arange(0, BLOCK // 32) * 32)[:, None] + tl.arange(0, 32)[None, :]
        tl.store(codes_ptr + row * D + d, codes, mask=d < D)
    else:
        y = tl.clamp(y, -TOP, TOP, propagate_nan=tl.PropagateNan.ALL)
        d = tl.arange(0, BLOCK)
        tl.store(codes_ptr + row * D + d, y.to(codes_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _norm(x_ptr, x_row, res_ptr, full_ptr, codes_ptr, scale_ptr, gain_ptr, bias_ptr, D, eps, BLOCK: tl.constexpr,
          LAYER: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, KEEP: tl.constexpr, FULL: tl.constexpr,
          NORM: tl.constexpr, TOP: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    d = _columns(BLOCK, TOP)
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
        x = tl.where(ok, x - _sum(x, TOP) / D, 0.0)
    if NORM:
        x = x * tl.rsqrt(_sum(x * x, TOP) / D + eps) * gain
    if BIAS:
        x += tl.load(bias_ptr + d, mask=ok, other=0.0).to(tl.float32)
    if FULL:
        tl.store(full_ptr + row * D + d, x.to(full_ptr.dtype.element_ty), mask=ok)
    if TOP == 448.0:
        x = x.to(full_ptr.dtype.element_ty).to(tl.float32)
    _write(x, codes_ptr, scale_ptr, row, 0.0, D, TOP, BLOCK, False)


@triton.jit
def _activate(x_ptr, x_row, bias_ptr, codes_ptr, scale_ptr, factor, D, NAME: tl.constexpr, GATED: tl.constexpr,
              BIAS: tl.constexpr, FACTOR: tl.constexpr, BLOCK: tl.constexpr, TOP: tl.constexpr,
              PDL: tl.constexpr):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    d = _columns(BLOCK, TOP)
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
    y = tl.where(ok, y, 0.0)
    if TOP == 448.0 and not FACTOR:
        y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
    _write(y, codes_ptr, scale_ptr, row, factor, D, TOP, BLOCK, FACTOR)


def _made(x: Tensor, width: int, format: Format) -> tuple[Rounded, dict[str, Any]]:
    """Room for the result, and options of a launch."""
    kind = torch.float8_e4m3fn if format == "fp8" else torch.int8
    count = x.shape[0]
    codes = torch.empty(count, width, dtype=kind, device=x.device)
    scale = torch.empty(count, 1, dtype=torch.float32, device=x.device)
    assert format == "fp8" or width % 32 == 0
    block = triton.next_power_of_2(width)
    of_a_warp = 512 if format == "fp8" else 1024  # 32 a thread
    options = launch_options(x.device, max(1, min(16, block // of_a_warp)), 1)
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


def _launch(
    x: Tensor, bias: Tensor | None, name: str, format: Format, gated: bool, bound: Bound | None = None
) -> Rounded:
    x = _flat(x)
    width = x.shape[1] // (2 if gated else 1)
    found, options = _made(x, width, format)
    _activate[(x.shape[0],)](
        x, x.stride(0), x if bias is None else bias, found.codes, found.scale, 0.0 if bound is None else bound.factor,
        width, NAME=ACTIVATION_CODES[name], GATED=gated, BIAS=bias is not None, FACTOR=bound is not None, **options,
    )  # fmt: skip
    return found if bound is None else Rounded(found.codes, bound.scale)


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
    bound: Bound | None = None,
) -> Tensor | Rounded:
    if activation is None:
        return _product(x, weight, scale, bias, dtype)
    if rounds is not None and bound is not None and x.codes.shape[0] > quantized_linear.MAX_ROWS:
        codes = fused_product(
            x.codes, weight, bias, activation, scales=(x.scale, scale), out_dtype=torch.float8_e4m3fn,
            factor=bound.factor, shape=_shape(x),
        )  # fmt: skip
        return Rounded(codes, bound.scale)
    out = _product(x, weight, scale, None, dtype)
    if rounds is not None:
        return _launch(out, bias, activation, rounds, False, bound)
    return bias_activate(out, bias, activation)


def _product(x: Rounded, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    fp8 = weight.dtype is torch.float8_e4m3fn
    count = x.codes.shape[0]
    if fp8 and count <= quantized_linear.MAX_ROWS:
        packed = quantized_linear.EightBitWeight(quantized_linear.FP8, weight, scale, row_scale=scale)
        each = x.scale.expand(count, 1).contiguous()
        return quantized_linear.small_product(x.codes, packed, x_scale=each, bias=bias, out_dtype=dtype)
    if fp8 and bias is None and dtype is torch.bfloat16 and x.scale.shape[0] == count and not INTERPRETED:
        return torch._scaled_mm(
            x.codes,
            weight.t(),
            scale_a=x.scale,
            scale_b=scale[None, :],
            out_dtype=dtype,
            use_fast_accum=True,
        )
    # With a bias ours is the faster one: it takes no further pass (H200, 16,384 x 1,024 x 3,072: 90 us against 85).
    return fused_product(x.codes, weight, bias, scales=(x.scale, scale), out_dtype=dtype, shape=_shape(x))


def _shape(x: Rounded) -> Shape | None:
    """Of tiles; None: those of large products."""
    return None if INTERPRETED or x.codes.shape[0] >= 2048 else Shape(64, 64, 128, warps=4)
