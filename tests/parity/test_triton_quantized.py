"""Kernels over weights of few bits against dequantized weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from headrace.kernels.linear import reference as linear_reference
from headrace.kernels.linear.tuning import GemvShape
from headrace.kernels.quantized_linear import reference
from headrace.kernels.quantized_linear import triton as fast
from headrace.kernels.quantized_linear.formats import pack_nibbles
from headrace.kernels.quantized_linear.triton_codes import four_bit_product
from headrace.kernels.quantized_linear.triton_dequantize import dequantize_codes
from headrace.kernels.quantized_linear.triton_gemv import fp8_gemv
from headrace.kernels.quantized_linear.tuning import CodesShape, PackedShape
from headrace.quantization import device, native_fp4
from headrace.quantization.experts import multiplies_experts
from headrace.quantization.native_fp4 import round_rows
from headrace.quantization.scaled import Activations, QuantizedWeight, ScaledLinear
from headrace.quantization.schemes.fp4 import Fp4Weight, quantize_mxfp4, quantize_nvfp4
from headrace.quantization.schemes.fp8 import quantize_fp8
from headrace.quantization.schemes.group_int import GroupIntWeight, quantize_group_int
from headrace.quantization.tiled import TiledWeight, tile
from support.row_scales import times
from triton_device import DEVICE, DTYPES, error, randn, tolerance

NVFP4, MXFP4, INT4 = "nvfp4", "mxfp4", "int4"
SHAPES = (CodesShape(2, 1, 1), CodesShape(4, 2, 2), CodesShape(2, 4, 1))


def four_bits(form: str, n: int, k: int, group: int) -> Fp4Weight | GroupIntWeight:
    """A weight with scales of every kind."""
    full = randn(n, k, dtype=torch.float32, seed=n + k, scale=k**-0.5)
    if form == INT4:
        whole = quantize_group_int(full, 4, group)
        zero = torch.randint(0, 17, whole.zero.shape, device=DEVICE).float()
        return GroupIntWeight(whole.codes, whole.scale, zero, 4)
    fp4 = quantize_nvfp4(full) if form == NVFP4 else quantize_mxfp4(full)
    return times(fp4, torch.rand(n, device=DEVICE) + 0.5)


def product(x: torch.Tensor, weight: TiledWeight, **options: object) -> torch.Tensor:
    return four_bit_product(x, **device.tiles(weight), rows=weight.shape[0], out_dtype=x.dtype, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("form", "group"), [(NVFP4, 16), (MXFP4, 32), (INT4, 32), (INT4, 64), (INT4, 128), (INT4, 384)]
)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 40, 384), (40, 24, 768)])
def test_four_bits(form: str, group: int, rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    weight = four_bits(form, n, k, group)
    dense = weight.dequantize()
    x = randn(rows, k, dtype=dtype, seed=1)
    bias, residual = randn(n, dtype=dtype, seed=2), randn(rows, n, dtype=dtype, seed=3)
    for shape, extra in zip(SHAPES, ({}, {"bias": bias, "residual": residual}, {"bias": bias})):
        out = product(x, tile(weight), shape=shape, **extra)
        want = linear_reference.small_linear(x.float(), dense.float(), **extra)  # type: ignore[arg-type]
        assert error(out, want) < 2 * tolerance(dtype)


@pytest.mark.parametrize("form", [NVFP4, MXFP4, INT4])
def test_four_bits_gated(form: str) -> None:
    dtype = DTYPES[-1]
    weight = four_bits(form, 96, 256, 64)
    x = randn(3, 256, dtype=dtype, seed=1)
    for shape in SHAPES:
        out = product(x, tile(weight), gate="silu", shape=shape)
        assert error(out, linear_reference.small_linear(x, weight.dequantize(), gate="silu")) < 2 * tolerance(
            dtype
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [NVFP4, MXFP4])
def test_every_scale_times_every_code(form: str, dtype: torch.dtype) -> None:
    """One column at a time, so that every weight is seen alone; NaN where the scale is."""
    group = 16 if form == NVFP4 else 32
    codes = torch.arange(16, dtype=torch.uint8, device=DEVICE).repeat(256, group // 16)
    scale = torch.arange(256, dtype=torch.uint8, device=DEVICE)[:, None]
    if form == MXFP4 and dtype is torch.float16:
        scale = scale.clamp(115, 137)  # what 16 bits of this type hold
    scale = scale if form == MXFP4 else scale.view(torch.float8_e4m3fn)
    weight = Fp4Weight(pack_nibbles(codes), scale, torch.ones(256, device=DEVICE))
    x = torch.eye(group, dtype=dtype, device=DEVICE)
    want = weight.dequantize()
    got = product(x, tile(weight)).t().float()
    known = torch.isfinite(want).all(1) & (want.abs().amax(1) < torch.finfo(dtype).max)
    if form == MXFP4:
        known[:2] = False  # subnormal numbers of 32 bits: not every unit keeps them
    assert known.sum() > 200
    torch.testing.assert_close(got[known], want[known], rtol=0, atol=0)
    nan = torch.isnan(want).all(1)
    assert torch.isnan(got[nan]).all()
    assert torch.equal(nan, torch.isnan(tile(weight).restore().dequantize()).all(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_small_scale_times_every_code(dtype: torch.dtype) -> None:
    """Powers of two up to 2 take another decoder, by one product."""
    codes = torch.arange(16, dtype=torch.uint8, device=DEVICE).repeat(129, 2)
    scale = torch.arange(129, dtype=torch.uint8, device=DEVICE)[:, None]
    if dtype is torch.float16:
        scale = scale.clamp(115)
    weight = Fp4Weight(pack_nibbles(codes), scale, torch.ones(129, device=DEVICE))
    tiled = tile(weight)
    assert tiled.small
    got = product(torch.eye(32, dtype=dtype, device=DEVICE), tiled).t().float()
    kept = slice(2, None)  # subnormal numbers of 32 bits: not every unit keeps them
    torch.testing.assert_close(got[kept], weight.dequantize()[kept], rtol=0, atol=0)
    for wrong in (129, 255):
        scale[77] = wrong
        assert not tile(Fp4Weight(weight.packed, scale, weight.row_scale)).small


@pytest.mark.parametrize("form", [NVFP4, MXFP4, INT4])
@pytest.mark.parametrize("shape", [CodesShape(2, 4, 1), CodesShape(1, 8, 2), CodesShape(4, 2, 2)], ids=str)
def test_columns_that_fill_no_block(form: str, shape: CodesShape) -> None:
    """Seven blocks and a half: warps past the end read weights that are there, and no columns that are not."""
    dtype, k = DTYPES[-1], 7 * 128 + 64
    weight = four_bits(form, 48, k, 32)
    wide = torch.full((11, k + 64), torch.nan, dtype=dtype, device=DEVICE)  # what follows a row is not read
    wide[:, :k] = randn(11, k, dtype=dtype, seed=1)
    for x in (wide[:, :k], wide[:3, :k]):
        out = product(x, tile(weight), shape=shape)
        want = linear_reference.small_linear(x, weight.dequantize())
        assert error(out, want) < 2 * tolerance(dtype)


@pytest.mark.parametrize("form", [NVFP4, MXFP4, INT4])
def test_dequantize_is_exact(form: str) -> None:
    """float32 out, so nothing is rounded that the definition does not round; and tiling loses nothing."""
    weight = four_bits(form, 37, 192, 32)
    tiled = tile(weight)
    got = dequantize_codes(**device.tiles(tiled), rows=37, columns=192, dtype=torch.float32)
    torch.testing.assert_close(got, weight.dequantize(), rtol=3e-7, atol=0)
    assert torch.equal(tiled.restore().dequantize(), weight.dequantize())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "n", "k", "gate"), [(1, 40, 128, None), (20, 24, 384, None), (3, 80, 128, "silu")]
)
def test_eight_bits(rows: int, n: int, k: int, gate: str | None, dtype: torch.dtype) -> None:
    whole = quantize_group_int(randn(n, k, dtype=torch.float32, seed=n + k, scale=k**-0.5), 8, 64)
    zero = torch.randint(0, 256, whole.zero.shape, device=DEVICE).float()
    weight = GroupIntWeight(whole.codes, whole.scale, zero, 8)
    x = randn(rows, k, dtype=dtype, seed=1)
    dense = weight.dequantize()
    for shape in (PackedShape(16, 64, 1, 4, 2), PackedShape(32, 64, 2, 4, 2)):
        packed = fast.EightBitWeight(fast.INT8, weight.codes, weight.scale, group=64, zero=zero)
        out = fast.small_product(x, packed, gate=gate, out_dtype=dtype, shape=shape)
        want = linear_reference.small_linear(x.float(), dense, gate=gate)
        assert error(out, want) < 2 * tolerance(dtype)
    got = fast.dequantize(weight.codes, weight.scale, zero, group=64, dtype=torch.float32)
    torch.testing.assert_close(got, dense, rtol=3e-7, atol=0)


@pytest.mark.parametrize(
    ("k", "group", "kernel"),
    [(384, 96, False), (384, 192, False), (96, 48, False), (80, 40, False), (384, 384, True), (80, 80, True)],
)
def test_eight_bits_in_odd_groups(k: int, group: int, kernel: bool) -> None:
    """Groups that end inside of what kernels decode at once are left to PyTorch, by linears and experts."""
    dtype = DTYPES[-1]
    weight = quantize_group_int(randn(24, k, dtype=torch.float32, seed=1, scale=k**-0.5), 8, group)
    linear = ScaledLinear(weight)
    assert device.has_kernel(linear) == multiplies_experts(weight, 2) == kernel
    for rows in (3, 70):
        x = randn(rows, k, dtype=dtype, seed=rows)
        assert error(device.product(linear, x), F.linear(x.float(), weight.dequantize())) < 2 * tolerance(
            dtype
        )


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
    packed = fast.EightBitWeight(fast.FP8, weight.codes, weight.scale)
    if granularity == "block":
        packed = packed._replace(group=weight.block[1], height=weight.block[0])
    else:
        packed = packed._replace(row_scale=weight.scale.expand(n, 1).reshape(n).contiguous())
    out = fast.small_product(
        codes,
        packed,
        x_scale=x_scale,
        x_group=128 if activation == "group" else 0,
        out_dtype=torch.float32,
        shape=PackedShape(32, 128, 2, 4, 2),
    )
    assert error(out, F.linear(rounded, weight.dequantize())) < (1e-3 if DEVICE.type == "cuda" else 1e-5)


@pytest.mark.parametrize(("k", "block"), [(80, (64, 128)), (80, (64, 80)), (576, (32, 576))])
def test_one_fp8_block_in_a_row(k: int, block: tuple[int, int]) -> None:
    """A scale for some rows and all columns, however many there are."""
    weight = quantize_fp8(randn(96, k, dtype=torch.float32, seed=6, scale=k**-0.5), "block", block)
    x = randn(3, k, dtype=DTYPES[-1], seed=7)
    for activations in (Activations("token"), Activations("group")):
        linear = ScaledLinear(weight, activations=activations)
        assert device.has_kernel(linear)
        assert error(device.product(linear, x), linear._reference(x)) < 4 * tolerance(DTYPES[-1])


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
    made = {name: ScaledLinear(w, bias=bias, activations=a) for name, (w, a) in cases.items()}
    for name in ("nvfp4", "mxfp4", "int4"):  # as on a GPU
        made[name].held = tile(cases[name][0])  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize("name", list(linears()))
@pytest.mark.parametrize("rows", [1, 20, 70])
def test_linears(name: str, rows: int) -> None:
    """Both ways of a ScaledLinear's forward: kernels, and what many rows take, against the reference."""
    linear, dtype = linears()[name], DTYPES[-1]
    x = randn(rows, 256, dtype=dtype, seed=10)
    if linear.bias is not None:
        linear.bias = linear.bias.to(dtype)
    if rows == 1 and name in ("fp8", "fp8_tensor_static"):  # one row is not rounded on GPUs
        want = F.linear(x.float(), linear.dequantize())
    else:
        want = linear._reference(x)
    want = want + linear.bias.float()  # type: ignore[union-attr]
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


@pytest.mark.parametrize(
    ("n", "k", "shape"), [(37, 1000, (4, 512, 2, 1)), (80, 256, (8, 128, 1, 1)), (12, 68, None)]
)
def test_one_row_of_fp8(n: int, k: int, shape: tuple[int, ...] | None) -> None:
    weight = quantize_fp8(randn(n, k, dtype=torch.float32, seed=6, scale=k**-0.5))
    for dtype in DTYPES:
        x, gain, bias = (randn(*size, dtype=dtype, seed=i) for i, size in enumerate(((1, k), (k,), (n,))))
        half = n // 2 if n % 2 == 0 else None
        for gate in (None, "gelu_tanh") if half else (None,):
            residual = randn(1, half if gate and half else n, dtype=dtype, seed=9)
            options = {"norm": (gain, 1e-5), "bias": bias, "gate": gate, "residual": residual}
            got = fp8_gemv(
                x, weight.codes, weight.scale.reshape(-1), **options, out_dtype=dtype,
                shape=None if shape is None else GemvShape(*shape),
            )  # fmt: skip
            want = linear_reference.small_linear(x, weight.dequantize(), **options, out_dtype=torch.float32)
            assert error(got, want) < 2 * tolerance(dtype)


@pytest.mark.parametrize("gate", [None, "silu"])
def test_what_surrounds_native_fp4(gate: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the product itself, which tests/unit/quantization/test_native_fp4.py looks at."""
    dtype = DTYPES[-1]
    weight = quantize_nvfp4(randn(32, 64, dtype=torch.float32, seed=14, scale=0.1))
    linear = ScaledLinear(weight, bias=randn(32, dtype=dtype, seed=15), activations=Activations("nvfp4"))
    linear.held = native_fp4.native(weight)  # type: ignore[assignment]
    monkeypatch.setattr(
        device, "native_product", lambda x, w: F.linear(round_rows(x).dequantize(), w.restore().dequantize())
    )
    x, residual = randn(3, 64, dtype=dtype, seed=16), randn(3, 16 if gate else 32, dtype=dtype, seed=17)
    gain = randn(64, dtype=dtype, seed=18)
    normed = round_rows(linear_reference_norm(x, gain)).dequantize()
    options = {"bias": linear.bias, "gate": gate, "residual": residual}
    want = linear_reference.small_linear(normed, weight.dequantize(), **options)  # type: ignore[arg-type]
    got = device.fused(linear, x, norm=(gain, 1e-5), gate=gate, residual=residual)
    assert error(got, want) < 0.02  # a norm's last bit may move a number to the next of E2M1
    assert device.has_kernel(linear)
    plain = F.linear(round_rows(x).dequantize(), weight.dequantize()) + linear.bias.float()  # type: ignore[union-attr]
    assert error(device.product(linear, x), plain) < tolerance(dtype)


def linear_reference_norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * gain.float()).to(x.dtype)


@pytest.mark.parametrize("gate", ["silu", "gelu", "gelu_tanh"])
def test_halves_that_do_not_end_with_a_tile(gate: str) -> None:
    dtype = DTYPES[-1]
    linear = ScaledLinear(quantize_nvfp4(randn(40, 128, dtype=torch.float32, seed=14, scale=0.1)))
    linear.held = tile(linear.quantized)  # type: ignore[arg-type]
    x, residual = randn(3, 128, dtype=dtype, seed=15), randn(3, 20, dtype=dtype, seed=16)
    want = linear_reference.small_linear(x, linear.dequantize(), gate=gate, residual=residual)
    assert error(device.fused(linear, x, gate=gate, residual=residual), want) < 2 * tolerance(dtype)
