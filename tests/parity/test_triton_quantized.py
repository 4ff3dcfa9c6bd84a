"""Kernels over weights of few bits against dequantized weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from headrace.kernels.linear import reference as linear_reference
from headrace.kernels.quantized_linear import reference
from headrace.kernels.quantized_linear import triton as fast
from headrace.kernels.quantized_linear.triton import FP8, INT4, INT8, MXFP4, NVFP4, PackedShape
from headrace.quantization import device
from headrace.quantization.scaled import Activations, QuantizedWeight, ScaledLinear
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
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 40, 128), (20, 24, 384)])
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


def linears() -> dict[str, ScaledLinear]:
    n, k = 96, 256
    full = randn(n, k, dtype=torch.float32, seed=8, scale=k**-0.5)
    bias = randn(n, dtype=torch.float32, seed=9)
    static = Activations("static", torch.tensor(0.02, device=DEVICE))
    cases: dict[str, tuple[QuantizedWeight, Activations]] = {
        "fp8": (quantize_fp8(full), Activations("token")),
        "fp8_tensor_static": (quantize_fp8(full, "tensor"), static),
        "fp8_block": (quantize_fp8(full, "block"), Activations("group")),
        "fp8_block_token": (quantize_fp8(full, "block"), Activations("token")),
        "fp8_weight_only": (quantize_fp8(full), Activations()),
        "nvfp4": (quantize_nvfp4(full), Activations()),
        "mxfp4": (quantize_mxfp4(full), Activations()),
        "int4": (quantize_group_int(full, 4, 128), Activations()),
        "int8": (quantize_group_int(full, 8, 256), Activations()),
    }
    return {name: ScaledLinear(w, bias=bias, activations=a) for name, (w, a) in cases.items()}


@pytest.mark.parametrize("name", list(linears()))
@pytest.mark.parametrize("rows", [1, 20, 70])
def test_linears(name: str, rows: int) -> None:
    """Both ways of a ScaledLinear's forward: kernels, and what many rows take, against the reference."""
    linear, dtype = linears()[name], DTYPES[-1]
    x = randn(rows, 256, dtype=dtype, seed=10)
    if linear.bias is not None:
        linear.bias = linear.bias.to(dtype)
    want = linear._reference(x) + linear.bias.float()  # type: ignore[union-attr]
    assert error(device.product(linear, x), want) < 4 * tolerance(dtype)
    assert device.has_kernel(linear) == (name != "fp8_weight_only")


@pytest.mark.parametrize("name", ["fp8", "fp8_block", "nvfp4", "int4"])
def test_fused(name: str) -> None:
    linear, dtype = linears()[name], DTYPES[-1]
    linear.bias = linear.bias.to(dtype)  # type: ignore[union-attr]
    x, residual = randn(5, 256, dtype=dtype, seed=11), randn(5, 48, dtype=dtype, seed=12)
    gain = randn(256, dtype=dtype, seed=13)
    got = device.fused(linear, x, norm=(gain, 1e-5), gate="silu", residual=residual)
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * gain.float()).to(dtype)
    both = linear._reference(normed) + linear.bias.float()
    want = F.silu(both[:, :48]) * both[:, 48:] + residual
    assert error(got, want) < (0.02 if "fp8" in name else 4 * tolerance(dtype))
