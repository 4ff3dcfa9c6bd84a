"""A ScaledLinear's product on a GPU: our kernels for few rows, PyTorch's scaled product or 16 bits for many."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.kernels.activation import gelu_mul, gelu_tanh_mul, silu_mul
from headrace.kernels.norm import rms_norm
from headrace.kernels.quantized_linear import quantize_rows, tuning
from headrace.kernels.quantized_linear import triton as kernels
from headrace.kernels.quantized_linear.eight_bits import reads_groups
from headrace.kernels.quantized_linear.formats import to_fp8
from headrace.kernels.quantized_linear.triton_codes import four_bit_product
from headrace.kernels.quantized_linear.triton_dequantize import dequantize_codes
from headrace.kernels.quantized_linear.triton_gemv import fp8_gemv
from headrace.kernels.rounding import Rounded
from headrace.quantization.native_fp4 import NativeFp4Weight, native_product
from headrace.quantization.schemes.fp8 import Fp8Weight
from headrace.quantization.schemes.group_int import GroupIntWeight
from headrace.quantization.tiled import TiledWeight

if TYPE_CHECKING:
    from headrace.quantization.scaled import ScaledLinear

__all__ = ["GROUP", "eight_bits", "fused", "has_kernel", "product", "rounded_rows", "row_scales", "tiles"]

GATES = {"silu": silu_mul, "gelu": gelu_mul, "gelu_tanh": gelu_tanh_mul}
GROUP = 128  # columns that share an activation's scale, for weights in blocks


def has_kernel(linear: ScaledLinear) -> bool:
    """Whether ``fused`` takes this linear."""
    weight = linear.held
    if isinstance(weight, Fp8Weight):
        blocks = weight.block[1] < weight.shape[1]
        return linear.activations.kind != "none" and (not blocks or weight.block[1] % GROUP == 0)
    if isinstance(weight, GroupIntWeight):
        return weight.bits == 8 and weight.order is None and reads_groups(weight.group, weight.shape[1])
    return isinstance(weight, (TiledWeight, NativeFp4Weight))


def fused(
    linear: ScaledLinear,
    x: Tensor,
    *,
    norm: tuple[Tensor, float] | None = None,
    gate: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``act(norm(x) @ weight.T + bias) + residual``, as kernels.linear.small_linear over plain weights.

    Args:
        x: [M, K], M at most kernels.MAX_ROWS.
    """
    weight = linear.held
    common: dict[str, Any] = {"bias": linear.bias, "gate": gate, "residual": residual, "out_dtype": x.dtype}
    if isinstance(weight, Fp8Weight):
        one = x.shape[0] == 1 and whole_rows(weight) and weight.shape[1] % 8 == 0
        if (
            one
            and tuning.fp8_ring_shape(x.device, 1, weight.shape[0], weight.shape[1], gate is not None) is None
        ):
            return fp8_gemv(x, weight.codes, row_scales(linear), norm=norm, **common)
        codes, scale = rounded_rows(linear, x, norm)
        x_group = GROUP if linear.activations.kind == "group" else 0
        return kernels.small_product(codes, eight_bits(linear), x_scale=scale, x_group=x_group, **common)
    if norm is not None:
        x = rms_norm(x, *norm)
    if isinstance(weight, NativeFp4Weight):
        wide = native_product(x, weight)
        wide = wide if linear.bias is None else wide + linear.bias.float()
        if gate is not None:
            return _gated(wide, gate, residual).to(x.dtype)
        return (wide if residual is None else wide + residual.float()).to(x.dtype)
    if isinstance(weight, TiledWeight):
        if x.shape[0] > tuning.FEW_ROWS:
            found = _wide_codes(linear, x, residual if gate is None else None)
            if found is not None and gate is not None:
                found = GATES[gate](found)
                found = found if residual is None else found + residual
            if found is not None:
                return found
        if gate is not None and weight.shape[0] % 32:  # halves do not end with a tile
            common |= {"gate": None, "residual": None, "out_dtype": torch.float32}
            both = four_bit_product(x, **tiles(weight), rows=weight.shape[0], **common)
            return _gated(both, gate, residual).to(x.dtype)
        return four_bit_product(x, **tiles(weight), rows=weight.shape[0], **common)
    return kernels.small_product(x, eight_bits(linear), **common)


def _gated(both: Tensor, gate: str, residual: Tensor | None) -> Tensor:
    """``act(first half) * second half + residual`` of float32 [M, 2 N]."""
    first, second = both.chunk(2, dim=1)
    if gate == "silu":
        out = F.silu(first) * second
    else:
        out = F.gelu(first, approximate="tanh" if gate == "gelu_tanh" else "none") * second
    return out if residual is None else out + residual.float()


def product(linear: ScaledLinear, x: Tensor) -> Tensor:
    """``x @ weight.T + bias`` of any number of rows, in the type of x."""
    if x.shape[0] <= kernels.MAX_ROWS and has_kernel(linear):
        return fused(linear, x if x.stride(1) == 1 else x.contiguous())
    weight = linear.held
    if isinstance(weight, NativeFp4Weight):
        return fused(linear, x)
    if isinstance(weight, Fp8Weight):
        if _torch_multiplies(linear, x):
            return rounded_product(linear, Rounded(*quantize_rows(x.contiguous())))
        rounded = linear.activations.rounded(x).to(x.dtype)
        return F.linear(rounded, weight.dequantize().to(x.dtype), linear.bias)
    wide = _wide_codes(linear, x)
    return F.linear(x, _dense(linear, x.dtype), linear.bias) if wide is None else wide


def _wide_codes(linear: ScaledLinear, x: Tensor, residual: Tensor | None = None) -> Tensor | None:
    """``x @ weight.T + bias + residual`` with FP4 weights where a kernel decodes them as it multiplies; else None."""
    weight = linear.held
    if not isinstance(weight, TiledWeight) or weight.row_scale is None:
        return None
    if not tuning.covers_wide(x, weight.group, weight.small):
        return None
    shape = tuning.wide_shape(x.device, x.shape[0], *weight.shape)
    if shape is None:
        return None
    from headrace.kernels.quantized_linear.gluon_wide import wide_product

    return wide_product(
        x if x.stride(1) == 1 else x.contiguous(), weight.words, weight.scale, weight.row_scale, rows=weight.shape[0],
        group=weight.group, bias=linear.bias, residual=residual, shape=shape,
    )  # fmt: skip


def takes_rounded(linear: ScaledLinear, x: Tensor) -> bool:
    """Whether ``product`` of rows like x rounds them first, and ``rounded_product`` takes them as they are then."""
    many = isinstance(linear.held, Fp8Weight) and x.shape[0] > kernels.MAX_ROWS
    return many and _torch_multiplies(linear, x)


def rounded_product(linear: ScaledLinear, x: Rounded) -> Tensor:
    """bfloat16 ``x @ weight.T + bias`` of rows that are FP8 already.

    Sums stay in the tensor core's own accumulator, which saves 5 to 10% of the product: rounding to FP8 costs random
    numbers 0.03745, and with it 0.03747 (4,096 columns) or 0.03753 (12,288).
    """
    weight = linear.held
    assert isinstance(weight, Fp8Weight)
    out: Tensor = torch._scaled_mm(
        x.codes, weight.codes.t(), scale_a=x.scale, scale_b=row_scales(linear)[None, :], out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )  # fmt: skip
    return out if linear.bias is None else out + linear.bias


def _dense(linear: ScaledLinear, dtype: torch.dtype) -> Tensor:
    """The weights in 16 bits, for products of many rows."""
    weight = linear.held
    if isinstance(weight, TiledWeight):
        rows, columns = weight.shape
        return dequantize_codes(**tiles(weight), rows=rows, columns=columns, dtype=dtype)
    if isinstance(weight, GroupIntWeight) and has_kernel(linear):
        return kernels.dequantize(weight.codes, weight.scale, weight.zero, group=weight.group, dtype=dtype)
    return linear.dequantize().to(dtype)


def eight_bits(linear: ScaledLinear) -> kernels.EightBitWeight:
    """A linear's weight of 8 bits for the kernels, FP8 for FP8 activations."""
    weight = linear.held
    if isinstance(weight, GroupIntWeight):
        return kernels.EightBitWeight(
            kernels.INT8, weight.codes, weight.scale, group=weight.group, zero=weight.zero
        )
    assert isinstance(weight, Fp8Weight)
    if whole_rows(weight):
        return kernels.EightBitWeight(kernels.FP8, weight.codes, weight.scale, row_scale=row_scales(linear))
    height, group = weight.block
    if group >= weight.shape[1]:  # one in a row, as wide as any step divides
        group = 1 << (max(weight.shape[1], GROUP) - 1).bit_length()
    return kernels.EightBitWeight(kernels.FP8, weight.codes, weight.scale, group=group, height=height)


def row_scales(linear: ScaledLinear) -> Tensor:
    """float32 [rows] of an FP8 weight with a scale a row or one in all, made once."""
    found = linear.row_scale
    if found is None:
        weight = linear.held
        assert isinstance(weight, Fp8Weight)
        found = linear.row_scale = weight.scale.expand(weight.shape[0], 1).reshape(-1).contiguous()
    return found


def whole_rows(weight: Fp8Weight) -> bool:
    """Whether each row has one scale."""
    return weight.block[1] >= weight.shape[1] and weight.block[0] in (1, weight.shape[0])


def _torch_multiplies(linear: ScaledLinear, x: Tensor) -> bool:
    """Whether torch._scaled_mm takes rows and scales as they are."""
    weight = linear.held
    assert isinstance(weight, Fp8Weight)
    even = weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0
    return whole_rows(weight) and even and linear.activations.kind == "token" and x.dtype is torch.bfloat16


def rounded_rows(
    linear: ScaledLinear, x: Tensor, norm: tuple[Tensor, float] | None = None
) -> tuple[Tensor, Tensor]:
    """The input of a linear (after a norm) as its activations say: float8_e4m3fn, and its scales."""
    kind, scale = linear.activations.kind, linear.activations.scale
    if kind == "static":
        assert scale is not None
        return to_fp8((rms_norm(x, *norm) if norm is not None else x).float() / scale), scale
    return quantize_rows(x, group=GROUP if kind == "group" else None, norm=norm)


def tiles(weight: TiledWeight) -> dict[str, Any]:
    """Arguments of the kernels that read it."""
    return {
        "words": weight.words, "scale": weight.scale, "zero": weight.zero, "row_scale": weight.row_scale,
        "group": weight.group, "small": weight.small,
    }  # fmt: skip
