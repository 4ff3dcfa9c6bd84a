"""NVFP4 by NVFP4 as Blackwell multiplies it: layouts and rounding, and the call with a stand-in for the product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.kernels.quantized_linear.formats import decode_e2m1
from headrace.quantization import native_fp4
from headrace.quantization.native_fp4 import block_scales, native, native_product, round_rows, unblock_scales
from headrace.quantization.scaled import Activations, ScaledLinear
from headrace.quantization.schemes.fp4 import quantize_mxfp4, quantize_nvfp4
from support.row_scales import times


@pytest.mark.parametrize(("rows", "groups"), [(128, 4), (1, 1), (130, 7), (300, 16), (16, 258)])
def test_scales_lie_where_cublas_reads_them(rows: int, groups: int) -> None:
    """Every place by the formula of the documentation; padding is zero; nothing is lost."""
    raw = torch.randint(1, 127, (rows, groups), dtype=torch.uint8)
    blocked = block_scales(raw.view(torch.float8_e4m3fn)).view(torch.uint8)
    wide = -(-groups // 4)
    want = torch.zeros(-(-rows // 128) * wide * 512, dtype=torch.uint8)
    for r in range(rows):
        for c in range(groups):
            tile = (r // 128) * wide + c // 4
            want[tile * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4] = raw[r, c]
    assert torch.equal(blocked, want)
    back = unblock_scales(blocked.view(torch.float8_e4m3fn), rows, groups)
    assert torch.equal(back.view(torch.uint8), raw)


def test_rows_are_rounded_alone() -> None:
    """Rounded rows are near, the same whoever is beside them, and stay what they are when rounded again."""
    torch.manual_seed(0)
    x = torch.randn(9, 96) * torch.logspace(-20, 20, 9)[:, None]
    x[4] = 0
    rounded = round_rows(x).dequantize()
    fine = (rounded - x).norm(dim=1) <= 0.12 * x.norm(dim=1)
    assert fine.all()
    for i in range(9):
        assert torch.equal(round_rows(x[i : i + 1]).dequantize()[0], rounded[i])
    exact = torch.tensor([[0.5, -6.0, 3.0, 0.0] * 8])
    torch.testing.assert_close(round_rows(exact).dequantize(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_its_row_only(bad: float) -> None:
    x = torch.randn(3, 32)
    x[1, 5] = bad
    rounded = round_rows(x).dequantize()
    assert rounded[1].isnan().all()
    assert rounded[[0, 2]].isfinite().all()


def stand_in(
    a: Tensor, b: Tensor, scale_a: Tensor, kind_a: Any, scale_b: Tensor, kind_b: Any, **rest: Any
) -> Tensor:
    """F.scaled_mm for NVFP4, from its documented operands; asks PyTorch itself (without data) whether it takes them."""
    halves = [part.to("meta") for part in (a, b, scale_a, scale_b)]
    shape = REAL(halves[0], halves[1], halves[2], kind_a, halves[3], kind_b, **rest).shape
    assert kind_a == kind_b == F.ScalingType.BlockWise1x16
    dense = []
    for codes, scale in ((a, scale_a), (b.t(), scale_b)):
        values = decode_e2m1(codes.view(torch.uint8))
        rows, groups = values.shape[0], values.shape[1] // 16
        scales = torch.empty(rows, groups)
        for r in range(rows):
            for c in range(groups):
                tile = (r // 128) * -(-groups // 4) + c // 4
                scales[r, c] = scale[tile * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4].float()
        dense.append(values * scales.repeat_interleave(16, 1))
    out = dense[0] @ dense[1].T
    assert out.shape == shape
    return out.to(rest["output_dtype"])


REAL = F.scaled_mm


@pytest.mark.parametrize(("rows", "n", "k"), [(1, 16, 32), (5, 144, 96), (130, 32, 64)])
def test_products(rows: int, n: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "scaled_mm", stand_in)
    torch.manual_seed(1)
    weight = times(quantize_nvfp4(torch.randn(n, k)), torch.rand(n) + 0.5)
    laid_out = native(weight)
    assert laid_out is not None
    assert torch.equal(laid_out.restore().dequantize(), weight.dequantize())
    x = torch.randn(rows, k)
    want = F.linear(round_rows(x).dequantize().double(), weight.dequantize().double())
    torch.testing.assert_close(native_product(x, laid_out).double(), want, rtol=1e-5, atol=1e-5)


def test_a_linear_takes_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU that can does with a ScaledLinear, and what is left to the kernels that decode."""
    monkeypatch.setattr(F, "scaled_mm", stand_in)
    torch.manual_seed(2)
    weight = quantize_nvfp4(torch.randn(32, 64))
    linear = ScaledLinear(weight, bias=torch.randn(32), activations=Activations("nvfp4"))
    x = torch.randn(3, 64)
    want = linear(x)  # the reference, on this CPU
    linear.hold(weight)
    assert isinstance(linear.held, native_fp4.NativeFp4Weight)
    torch.testing.assert_close(native_product(x, linear.held) + linear.bias, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(linear.dequantize(), weight.dequantize())
    for other in (quantize_mxfp4(torch.randn(32, 64)), quantize_nvfp4(torch.randn(33, 64))):
        left = ScaledLinear(other, activations=Activations("nvfp4"))
        left.hold(other)
        assert not isinstance(left.held, native_fp4.NativeFp4Weight)
        assert left.activations.kind == "none"


def test_only_devices_that_can_round_activations() -> None:
    assert not native_fp4.can_multiply(torch.device("cpu"))
    assert Activations("nvfp4").to(torch.device("cpu")).kind == "none"
