"""Numbers of few bits against exhaustive references."""

from __future__ import annotations

import math
import random

import pytest
import torch

from headrace.kernels.quantized_linear.formats import (
    E2M1_VALUES,
    decode_e2m1,
    decode_e8m0,
    encode_e2m1,
    encode_e8m0,
    pack_nibbles,
    to_fp8,
    unpack_nibbles,
)


def e4m3(code: int) -> float:
    """From the definition: sign, 4 exponent bits with bias 7, 3 of mantissa; all ones is NaN."""
    sign, exponent, mantissa = (-1) ** (code >> 7), code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return sign * size


def e2m1(code: int) -> float:
    sign, exponent, mantissa = (-1) ** (code >> 3), code >> 1 & 3, code & 1
    return sign * (mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def test_every_fp8_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()
    for code, value in enumerate(codes):
        expected = e4m3(code)
        assert value == expected or (math.isnan(value) and math.isnan(expected))
        if not math.isnan(expected):
            assert to_fp8(torch.tensor(expected)).view(torch.uint8).item() == code


def test_fp8_saturates_and_keeps_nan() -> None:
    x = torch.tensor([1e9, -1e9, 460.0, math.inf, math.nan])
    assert to_fp8(x).float().tolist()[:4] == [448.0, -448.0, 448.0, 448.0]
    assert torch.isnan(to_fp8(x).float()[4])


def test_every_fp4_pair() -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(-1, 1)
    values = decode_e2m1(packed).tolist()
    assert values == [[e2m1(byte & 15), e2m1(byte >> 4)] for byte in range(256)]
    assert list(E2M1_VALUES) == [e2m1(code) for code in range(16)]
    assert torch.equal(encode_e2m1(decode_e2m1(packed)), packed)
    assert torch.equal(pack_nibbles(unpack_nibbles(packed)), packed)


def test_fp4_rounds_to_nearest_even() -> None:
    """Against the nearest of all codes, the even one where two are as near."""
    generator = random.Random(0)
    points = [generator.uniform(-8, 8) for _ in range(500)]
    points += [s * (e2m1(c) + e2m1(c + 1)) / 2 for c in range(7) for s in (1, -1)]
    packed = encode_e2m1(torch.tensor([[x, x] for x in points]))
    for x, code in zip(points, (packed[:, 0] & 15).tolist()):
        near = min(range(8), key=lambda c: (abs(abs(x) - e2m1(c)), c % 2))
        assert code & 7 == near, x
        assert code >> 3 == (x < 0)


def test_every_e8m0_byte() -> None:
    values = decode_e8m0(torch.arange(256, dtype=torch.uint8))
    assert torch.isnan(values[255])
    assert values[:255].double().tolist() == [2.0 ** (e - 127) for e in range(255)]
    assert torch.equal(encode_e8m0(values[1:255]), torch.arange(1, 255, dtype=torch.uint8))


@pytest.mark.parametrize(("x", "exponent"), [(1.0, 127), (1.99, 127), (2.0, 128), (0.75, 126)])
def test_e8m0_rounds_down(x: float, exponent: int) -> None:
    assert encode_e8m0(torch.tensor(x)).item() == exponent
