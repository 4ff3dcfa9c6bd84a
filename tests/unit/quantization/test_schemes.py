"""Weights of few bits: decoding from the definition, rounding, joining, and stability."""

from __future__ import annotations

import pytest
import torch
from test_formats import e2m1, e4m3

from headrace.errors import UnsupportedCheckpoint
from headrace.quantization.scaled import Activations, ScaledLinear, joined_linear
from headrace.quantization.schemes.fp4 import Fp4Weight, quantize_mxfp4, quantize_nvfp4
from headrace.quantization.schemes.fp8 import Fp8Weight, quantize_fp8
from headrace.quantization.schemes.group_int import quantize_group_int

MAKERS = {
    "fp8_tensor": lambda w: quantize_fp8(w, "tensor"),
    "fp8_channel": quantize_fp8,
    "fp8_block": lambda w: quantize_fp8(w, "block"),
    "fp8_small_block": lambda w: quantize_fp8(w, "block", (3, 10)),
    "nvfp4": quantize_nvfp4,
    "mxfp4": quantize_mxfp4,
    "int8": lambda w: quantize_group_int(w, 8, w.shape[1]),
    "int4": lambda w: quantize_group_int(w, 4, 32),
}
# Relative error of normal weights: half a step of the format, and some room.
ERRORS = dict.fromkeys(MAKERS, 0.03) | {"nvfp4": 0.1, "mxfp4": 0.13, "int4": 0.1, "int8": 0.01}


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rising = torch.linspace(0.01, 3, rows)[:, None]
    return torch.randn(rows, columns, generator=generator) * rising


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("shape", [(5, 64), (160, 192), (33, 288)])
def test_rounding_is_near_and_stable(name: str, shape: tuple[int, int]) -> None:
    full = weights(*shape)
    packed = MAKERS[name](full)
    once = packed.dequantize()
    assert packed.shape == shape
    assert once.shape == full.shape
    assert once.dtype == torch.float32
    assert relative(once, full) < ERRORS[name]
    again = MAKERS[name](once).dequantize()
    assert relative(again, once) < 1e-6


def test_every_fp4_code_with_every_scale() -> None:
    """All 16 codes under all 256 scale bytes, of both kinds."""
    codes = torch.arange(16, dtype=torch.uint8)
    row = (codes[::2] | codes[1::2] << 4).expand(256, 8).contiguous()
    bytes_ = torch.arange(256, dtype=torch.uint8)[:, None]
    nvfp4 = Fp4Weight(row, bytes_.view(torch.float8_e4m3fn), torch.full((256,), 0.5)).dequantize()
    mxfp4 = Fp4Weight(row.repeat(1, 2), bytes_, torch.ones(256)).dequantize()
    assert mxfp4.shape == (256, 32)
    for byte in range(256):
        for code in range(16):
            expected = torch.tensor(e2m1(code) * e4m3(byte) * 0.5)
            assert torch.equal(nvfp4[byte, code].nan_to_num(7777), expected.nan_to_num(7777))
            if byte < 253:  # above it the product leaves float32
                assert mxfp4[byte, code].item() == e2m1(code) * 2.0 ** (byte - 127)


def test_fp8_block_scales_meet_their_blocks() -> None:
    codes = torch.randint(0, 127, (5, 7), dtype=torch.uint8)
    scale = torch.rand(3, 3) + 0.5
    got = Fp8Weight(codes.view(torch.float8_e4m3fn), scale, (2, 3)).dequantize()
    for i in range(5):
        for j in range(7):
            value = torch.tensor(e4m3(int(codes[i, j]))) * scale[i // 2, j // 3]
            assert torch.equal(got[i, j], value)


@pytest.mark.parametrize("name", MAKERS)
def test_joined_rows_are_the_parts(name: str) -> None:
    parts = [weights(rows, 96, seed=rows) for rows in (40, 7, 9)]
    packed = [MAKERS[name](part) for part in parts]
    joined = joined_linear(packed, bias=None, activations=[Activations()] * 3)
    assert joined is not None
    assert joined.parts == (40, 7, 9)
    assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in packed]))


def test_what_cannot_be_joined() -> None:
    full = weights(32, 64)
    kinds = [quantize_fp8(full), quantize_nvfp4(full)]
    assert joined_linear(kinds, bias=None, activations=[Activations()] * 2) is None
    ints = [quantize_group_int(full, 4, 32), quantize_group_int(full, 4, 64)]
    assert joined_linear(ints, bias=None, activations=[Activations()] * 2) is None
    fp4 = [quantize_mxfp4(full), quantize_nvfp4(full)]
    assert joined_linear(fp4, bias=None, activations=[Activations()] * 2) is None


@pytest.mark.parametrize("name", MAKERS)
def test_linear_multiplies_with_what_it_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.quantization.scaled._CHUNK_ELEMENTS", 64 * 128)  # several chunks
    packed, bias = MAKERS[name](weights(300, 64)), torch.randn(300)
    linear = ScaledLinear(packed, bias=bias)
    x = torch.randn(2, 3, 64)
    expected = x @ packed.dequantize().T + bias
    torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-4)
    assert linear(x.bfloat16()).dtype == torch.bfloat16
    assert not list(linear.parameters())
    assert linear.nbytes < 300 * 64 * 2 * 0.8


@pytest.mark.parametrize("kind", ["token", "group", "static"])
def test_rounded_activations(kind: str) -> None:
    x = torch.randn(4, 300) * torch.tensor([0.01, 1.0, 30.0, 2.0])[:, None]
    scale = torch.tensor(0.5) if kind == "static" else None
    got = Activations(kind, scale).rounded(x)  # type: ignore[arg-type]
    for i in range(4):
        for start, stop in [(0, 128), (128, 256), (256, 300)] if kind == "group" else [(0, 300)]:
            part = x[i, start:stop]
            step = float(scale) if scale is not None else float(part.abs().max() / 448)
            expected = (part / step).clamp(-448, 448).to(torch.float8_e4m3fn).float() * step
            torch.testing.assert_close(got[i, start:stop], expected, rtol=1e-6, atol=0)


def test_zeros_and_refused_widths() -> None:
    for make in MAKERS.values():
        assert not make(torch.zeros(4, 64)).dequantize().any()
    for name in ("nvfp4", "mxfp4", "int4"):
        with pytest.raises(UnsupportedCheckpoint, match="16 bits"):
            MAKERS[name](torch.ones(4, 72))
