"""Kernels over weights of few bits against dequantized weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from headrace.kernels.linear import reference as linear_reference
from headrace.kernels.quantized_linear import reference
from headrace.kernels.quantized_linear import triton as fast
from headrace.kernels.quantized_linear.triton import FP8, INT4, INT8, MXFP4, NVFP4, PackedShape
from headrace.quantization.schemes.fp4 import quantize_mxfp4, quantize_nvfp4
from headrace.quantization.schemes.fp8 import quantize_fp8
from headrace.quantization.schemes.group_int import GroupIntWeight, quantize_group_int
from triton_device import DEVICE, DTYPES, error, randn, tolerance

SMALL = PackedShape(16, 64, 1, 4, 2)
SPLIT = PackedShape(32, 64, 2, 4, 2)


def packed(form: int, n: int, k: int, group: int) -> tuple[dict[str, object], torch.Tensor]:
    """Arguments of small_product and the dense weight."""
    full = randn(n, k, dtype=torch.float32, seed=n + k, scale=k**-0.5)
    if form in (NVFP4, MXFP4):
        fp4 = quantize_nvfp4(full) if form == NVFP4 else quantize_mxfp4(full)
        factor = torch.rand(n, device=DEVICE) + 0.5
        fp4 = fp4.scaled_rows(factor)
        parts = {"weight": fp4.packed, "scale": fp4.scale, "row_scale": fp4.row_scale, "group": fp4.group}
        return parts, fp4.dequantize()
    whole = quantize_group_int(full, 4 if form == INT4 else 8, group)
    zero = torch.randint(0, 16 if form == INT4 else 256, whole.zero.shape, device=DEVICE).float()
    ints = GroupIntWeight(whole.codes, whole.scale, zero, whole.bits)
    return {"weight": ints.codes, "scale": ints.scale, "zero": zero, "group": group}, ints.dequantize()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("form", "group"), [(NVFP4, 16), (MXFP4, 32), (INT4, 32), (INT4, 128), (INT8, 64)])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 40, 128), (5, 48, 384), (40, 24, 256)])
def test_weight_only(form: int, group: int, rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    parts, dense = packed(form, n, k, group)
    x = randn(rows, k, dtype=dtype, seed=1)
    bias, residual = randn(n, dtype=dtype, seed=2), randn(rows, n, dtype=dtype, seed=3)
    for shape in (SMALL, SPLIT):
        for extra in ({}, {"bias": bias, "residual": residual}):
            out = fast.small_product(x, **parts, form=form, out_dtype=dtype, shape=shape, **extra)  # type: ignore[arg-type]
            want = linear_reference.small_linear(x.float(), dense.float(), **extra)
            assert error(out, want) < 2 * tolerance(dtype)


@pytest.mark.parametrize("form", [NVFP4, INT4, INT8])
def test_gated(form: int) -> None:
    dtype = DTYPES[0]
    parts, dense = packed(form, 80, 128, 32)
    x = randn(3, 128, dtype=dtype, seed=1)
    for shape in (SMALL, SPLIT):
        out = fast.small_product(x, **parts, form=form, gate="silu", out_dtype=dtype, shape=shape)  # type: ignore[arg-type]
        assert error(out, linear_reference.small_linear(x, dense, gate="silu")) < 2 * tolerance(dtype)


@pytest.mark.parametrize("form", [NVFP4, MXFP4, INT4, INT8])
def test_dequantize_is_exact(form: int) -> None:
    """Every code under every scale: float32 out, so nothing is rounded that the definition does not round."""
    parts, dense = packed(form, 37, 192, 32)
    got = fast.dequantize(**parts, form=form, dtype=torch.float32)  # type: ignore[arg-type]
    torch.testing.assert_close(got, dense, rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [None, 128])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("rows", "k"), [(1, 64), (3, 300), (2, 5000)])
def test_quantize_rows(rows: int, k: int, normed: bool, group: int | None, dtype: torch.dtype) -> None:
    x = randn(rows, k, dtype=dtype, seed=4) * torch.tensor([[0.01], [5.0], [100.0]], device=DEVICE)[:rows].to(
        dtype
    )
    norm = (randn(k, dtype=dtype, seed=5), 1e-5) if normed else None
    codes, scale = fast.quantize_rows(x, group=group, norm=norm)
    want_codes, want_scale = reference.quantize_rows(x, group=group, norm=norm)
    assert codes.dtype == torch.float8_e4m3fn
    assert scale.shape == want_scale.shape
    assert error(scale, want_scale) < 1e-3 if normed else 1e-6
    # A different order of sums moves a few numbers by one step; all others are the same.
    same = (codes.view(torch.uint8) == want_codes.view(torch.uint8)).float().mean()
    if DEVICE.type == "cuda":
        assert same > (0.97 if normed else 0.999)
        assert error(codes.float(), want_codes.float()) < 0.02
    else:  # Triton's interpreter rounds halves up and does not carry into the exponent
        assert same > 0.9
        assert error(codes.float(), want_codes.float()) < 0.1


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
@pytest.mark.parametrize("activation", ["token", "group", "static"])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 144, 256), (20, 72, 384)])
def test_fp8_products(granularity: str, activation: str, rows: int, n: int, k: int) -> None:
    weight = quantize_fp8(randn(n, k, dtype=torch.float32, seed=6, scale=k**-0.5), granularity)  # type: ignore[arg-type]
    x = randn(rows, k, dtype=torch.float32, seed=7)
    x_scale = torch.tensor(0.02, device=DEVICE)
    if activation == "static":
        codes = (x / x_scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        rounded = codes.float() * x_scale
    else:
        codes, x_scale = reference.quantize_rows(x, group=128 if activation == "group" else None)
        rounded = codes.float() * (
            x_scale.repeat_interleave(128, 1)[:, :k] if activation == "group" else x_scale
        )
    block = granularity == "block"
    row_scale = None if block else weight.scale.expand(n, 1).reshape(n).contiguous()
    out = fast.small_product(
        codes,
        weight.codes,
        weight.scale,
        form=FP8,
        group=weight.block[1] if block else 0,
        height=weight.block[0],
        row_scale=row_scale,
        x_scale=x_scale,
        x_group=128 if activation == "group" else 0,
        out_dtype=torch.float32,
        shape=PackedShape(32, 128, 2, 4, 2),
    )
    assert error(out, F.linear(rounded, weight.dequantize())) < (1e-3 if DEVICE.type == "cuda" else 1e-5)
