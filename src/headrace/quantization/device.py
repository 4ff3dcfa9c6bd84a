"""A ScaledLinear's product on a GPU: our kernels for few rows, PyTorch's scaled product or 16 bits for many."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.kernels.norm import rms_norm
from headrace.kernels.quantized_linear import quantize_rows
from headrace.kernels.quantized_linear import triton as kernels
from headrace.kernels.quantized_linear.formats import to_fp8
from headrace.quantization.scaled import ScaledLinear
from headrace.quantization.schemes.fp4 import MXFP4_GROUP, Fp4Weight
from headrace.quantization.schemes.fp8 import Fp8Weight
from headrace.quantization.schemes.group_int import GroupIntWeight

__all__ = ["fused", "has_kernel", "product"]

_GROUP = 128  # columns that share an activation's scale, for weights in blocks


def has_kernel(linear: ScaledLinear) -> bool:
    """Whether ``fused`` takes this linear."""
    weight = linear.quantized
    if isinstance(weight, Fp8Weight):
        blocks = weight.block[1] < weight.shape[1]
        return linear.activations.kind != "none" and (not blocks or weight.block[1] % _GROUP == 0)
    if isinstance(weight, Fp4Weight):
        return weight.shape[1] % 32 == 0
    return weight.order is None and weight.group % 16 == 0


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
    weight = linear.quantized
    common: dict[str, Any] = {"bias": linear.bias, "gate": gate, "residual": residual, "out_dtype": x.dtype}
    if isinstance(weight, Fp8Weight):
        codes, scale = _rounded(linear, x, norm)
        blocks = weight.block[1] < weight.shape[1] or weight.block[0] not in (1, weight.shape[0])
        return kernels.small_product(
            codes,
            weight.codes,
            weight.scale,
            form=kernels.FP8,
            group=weight.block[1] if blocks else 0,
            height=weight.block[0],
            row_scale=None if blocks else row_scales(linear),
            x_scale=scale,
            x_group=_GROUP if linear.activations.kind == "group" else 0,
            **common,
        )
    if norm is not None:
        x = rms_norm(x, *norm)
    return kernels.small_product(x, **_packed(weight), **common)


def product(linear: ScaledLinear, x: Tensor) -> Tensor:
    """``x @ weight.T + bias`` of any number of rows, in the type of x."""
    if x.shape[0] <= kernels.MAX_ROWS and has_kernel(linear):
        return fused(linear, x if x.stride(1) == 1 else x.contiguous())
    weight = linear.quantized
    if isinstance(weight, Fp8Weight):
        if _torch_multiplies(linear, x):
            codes, scale = quantize_rows(x.contiguous())
            factors = row_scales(linear)[None, :]
            out: Tensor = torch._scaled_mm(
                codes, weight.codes.t(), scale_a=scale, scale_b=factors, out_dtype=torch.bfloat16
            )
            return out if linear.bias is None else out + linear.bias
        rounded = linear.activations.rounded(x).to(x.dtype)
        return F.linear(rounded, weight.dequantize().to(x.dtype), linear.bias)
    if has_kernel(linear):
        dense = kernels.dequantize(**_packed(weight), dtype=x.dtype)
    else:
        dense = weight.dequantize().to(x.dtype)
    return F.linear(x, dense, linear.bias)


def row_scales(linear: ScaledLinear) -> Tensor:
    """float32 [rows] of an FP8 weight with a scale a row or one in all, made once."""
    found = linear.row_scale
    if found is None:
        weight = linear.quantized
        assert isinstance(weight, Fp8Weight)
        found = linear.row_scale = weight.scale.expand(weight.shape[0], 1).reshape(-1).contiguous()
    return found


def _torch_multiplies(linear: ScaledLinear, x: Tensor) -> bool:
    """Whether torch._scaled_mm takes rows and scales as they are."""
    weight = linear.quantized
    assert isinstance(weight, Fp8Weight)
    whole = weight.block[1] >= weight.shape[1] and weight.block[0] in (1, weight.shape[0])
    even = weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0
    return whole and even and linear.activations.kind == "token" and x.dtype is torch.bfloat16


def _rounded(linear: ScaledLinear, x: Tensor, norm: tuple[Tensor, float] | None) -> tuple[Tensor, Tensor]:
    kind, scale = linear.activations.kind, linear.activations.scale
    if kind == "static":
        assert scale is not None
        return to_fp8((rms_norm(x, *norm) if norm is not None else x).float() / scale), scale
    return quantize_rows(x, group=_GROUP if kind == "group" else None, norm=norm)


def _packed(weight: Fp4Weight | GroupIntWeight) -> dict[str, Any]:
    if isinstance(weight, Fp4Weight):
        form = kernels.MXFP4 if weight.group == MXFP4_GROUP else kernels.NVFP4
        parts = {"weight": weight.packed, "scale": weight.scale, "row_scale": weight.row_scale}
        return {**parts, "form": form, "group": weight.group}
    form = kernels.INT4 if weight.bits == 4 else kernels.INT8
    parts = {"weight": weight.codes, "scale": weight.scale, "zero": weight.zero}
    return {**parts, "form": form, "group": weight.group}
