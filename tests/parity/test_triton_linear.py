"""Fused linear maps of few rows against the reference."""

from __future__ import annotations

import pytest
import torch

from headrace.kernels.linear import reference, triton_fixed
from headrace.kernels.linear import triton as fast
from headrace.kernels.linear.tuning import GemvShape, SkinnyShape
from triton_device import DEVICE, DTYPES, ON_GPU, error, randn, tolerance

SHAPES = [(1, 48, 64), (1, 70, 200), (2, 96, 128), (5, 72, 264), (17, 40, 64), (50, 130, 96)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", [None, "silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize(("rows", "n", "k"), SHAPES)
def test_small_linear(rows: int, n: int, k: int, gate: str | None, dtype: torch.dtype) -> None:
    x, weight = randn(rows, k, dtype=dtype, seed=0), randn(n, k, dtype=dtype, seed=1, scale=k**-0.5)
    width = n if gate is None else n // 2
    full = {
        "norm": (randn(k, dtype=dtype, seed=2), 1e-5),
        "bias": randn(n, dtype=dtype, seed=3),
        "residual": randn(rows, width, dtype=dtype, seed=4),
    }
    for options in ({}, full):
        expected = reference.small_linear(x.float(), weight.float(), gate=gate, **options)
        out = torch.full((rows, width), torch.nan, dtype=dtype, device=DEVICE)
        fast.small_linear(x, weight, gate=gate, out=out, **options)
        assert error(out, expected) < 2 * tolerance(dtype)


@pytest.mark.parametrize("splits", [2, 3])
@pytest.mark.parametrize("gate", [None, "silu"])
def test_split_sums(splits: int, gate: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """K cut in parts, the last of them shorter or empty; twice, so that the counters must be reset."""
    monkeypatch.setattr(fast, "_shape", lambda *_: SkinnyShape(16, 64, 64, splits, 4, 3))
    dtype = DTYPES[0]
    x, weight = randn(7, 320, dtype=dtype, seed=0), randn(96, 320, dtype=dtype, seed=1, scale=0.05)
    norm = (randn(320, dtype=dtype, seed=2), 1e-6)
    expected = reference.small_linear(x, weight, norm=norm, gate=gate)
    first = fast.small_linear(x, weight, norm=norm, gate=gate)
    assert error(first, expected) < 2 * tolerance(dtype)
    assert torch.equal(first, fast.small_linear(x, weight, norm=norm, gate=gate))


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_argmax(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if rows == 1:
        monkeypatch.setattr(fast, "_shape", lambda *_: GemvShape(4, 128, 4, 1))
    dtype = DTYPES[0]
    x, weight = randn(rows, 128, dtype=dtype, seed=0), randn(999, 128, dtype=dtype, seed=1)
    norm = (randn(128, dtype=dtype, seed=2), 1e-6)
    expected = reference.argmax_linear(x, weight, norm=norm)
    assert torch.equal(fast.argmax_linear(x, weight, norm=norm), expected)
    x[rows - 1, 5] = torch.nan
    got = fast.argmax_linear(x, weight, norm=norm)
    assert got[-1] == -1
    assert torch.equal(got[:-1], expected[:-1])


def test_fp32_logits() -> None:
    x, weight = randn(3, 64, dtype=DTYPES[-1], seed=0), randn(80, 64, dtype=DTYPES[-1], seed=1)
    out = fast.small_linear(x, weight, out_dtype=torch.float32)
    assert out.dtype == torch.float32
    assert error(out, reference.small_linear(x, weight, out_dtype=torch.float32)) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "k"), [(70, 72), (70, 600), (200, 1072), (1000, 2048)][: None if ON_GPU else 2]
)
def test_fixed_linear(n: int, k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise: a row alone and among any number of others, whatever tiles there are."""
    count = 700 if ON_GPU else 130
    x, weight, bias = (
        randn(*shape, dtype=dtype, seed=i, scale=s)
        for i, (shape, s) in enumerate([((count, k), 1.0), ((n, k), k**-0.5), ((n,), 1.0)])
    )
    if not ON_GPU:
        monkeypatch.setattr(triton_fixed, "_PROGRAMS", 5)  # the spans of many rows in one program, too
    out = fast.fixed_linear(x, weight, bias=bias)
    assert error(out, reference.small_linear(x, weight, bias=bias)) < 2 * tolerance(dtype)
    places = [(0, 1), (64, 65), (64, 90), (3, 90), (count - 1, count), (5, 40), (40, 120), (2, 129)]
    for low, high in places:
        part = fast.fixed_linear(x[low:high], weight, bias=bias)
        # The interpreter's products are a BLAS's, whose order depends on the shape.
        assert torch.equal(part, out[low:high]) if ON_GPU else error(part, out[low:high]) < tolerance(dtype)
    assert not any(arrivals.any() for arrivals in triton_fixed._SCRATCH.arrivals.get(x.device, []))
