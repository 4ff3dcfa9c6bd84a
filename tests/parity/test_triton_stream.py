"""Linear maps around a residual stream against the reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from headrace.kernels.linear import reference, tuning
from headrace.kernels.linear import triton_stream as fast
from headrace.kernels.linear.triton_stream import add_linear, begin_stream, stream_argmax, stream_linear
from headrace.kernels.linear.tuning import StreamShape
from triton_device import DEVICE, DTYPES, ON_GPU, error, randn, tolerance

EPS = 1e-5
SHAPES = [(2, 48, 64), (5, 72, 264), (17, 40, 64), (70, 130, 96)]  # rows, outputs, columns
if ON_GPU:
    SHAPES += [(200, 1000, 520), (16, 1024, 2048), (2500, 384, 128)]


@pytest.fixture
def splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """K cut in so many parts, the last of them shorter or empty; either operand first."""
    parts, x_first = request.param
    monkeypatch.setattr(fast, "_shape", lambda *_: StreamShape(16, 64, 64, parts, 4, 3, x_first))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", [None, "silu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "n", "k"), SHAPES)
def test_after_a_norm(rows: int, n: int, k: int, gate: str | None, dtype: torch.dtype) -> None:
    x, weight = randn(rows, k, dtype=dtype, seed=0), randn(n, k, dtype=dtype, seed=1, scale=k**-0.5)
    gain, bias = randn(k, dtype=dtype, seed=2), randn(n, dtype=dtype, seed=3)
    expected = reference.small_linear(x.float(), weight.float(), norm=(gain, EPS), bias=bias, gate=gate)
    out = stream_linear(begin_stream(x, gain), weight, eps=EPS, bias=bias, gate=gate)
    assert out.dtype is dtype and error(out, expected) < 2 * tolerance(dtype)
    plain = stream_linear(x, weight, gate=gate, out_dtype=torch.float32)
    assert plain.dtype is torch.float32
    assert error(plain, reference.small_linear(x.float(), weight.float(), gate=gate)) < 2 * tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "n", "k"), SHAPES)
def test_before_a_norm(rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    """The sum, the sum times the next gain, and the scale of its norm."""
    x, weight = randn(rows, k, dtype=dtype, seed=0), randn(n, k, dtype=dtype, seed=1, scale=k**-0.5)
    residual, gain, bias = (randn(*s, dtype=dtype, seed=i) for i, s in enumerate([(rows, n), (n,), (n,)], 4))
    stream = add_linear(x, weight, begin_stream(residual, gain), gain, bias=bias)
    expected = reference.small_linear(x.float(), weight.float(), bias=bias, residual=residual.float())
    assert error(stream.x, expected) < 2 * tolerance(dtype)
    assert torch.equal(stream.scaled, (stream.x.float() * gain.float()).to(dtype))
    assert error(stream.squares.sum(0), stream.x.double().square().sum(1)) < 1e-5


@pytest.mark.parametrize("splits", [(2, False), (3, False), (1, True), (2, True)], indirect=True)
@pytest.mark.usefixtures("splits")
def test_split_sums() -> None:
    """Twice, so that the counters must be reset; several tiles of rows, each with parts of its own."""
    dtype = DTYPES[0]
    x, weight = randn(37, 320, dtype=dtype, seed=0), randn(96, 320, dtype=dtype, seed=1, scale=0.05)
    gain = randn(320, dtype=dtype, seed=2)
    for gate in (None, "silu"):
        expected = reference.small_linear(x, weight, norm=(gain, EPS), gate=gate)
        first = stream_linear(begin_stream(x, gain), weight, eps=EPS, gate=gate)
        assert error(first, expected) < 2 * tolerance(dtype)
        assert torch.equal(first, stream_linear(begin_stream(x, gain), weight, eps=EPS, gate=gate))
    residual = randn(37, 96, dtype=dtype, seed=3)
    stream = add_linear(x, weight, begin_stream(residual, gain[:96]), gain[:96])
    assert error(stream.x, reference.small_linear(x, weight, residual=residual)) < 2 * tolerance(dtype)
    assert error(stream.squares.sum(0), stream.x.double().square().sum(1)) < 1e-5


def measured_shapes() -> list[StreamShape]:
    """Every shape that a GPU was measured with, once."""
    tables = (Path(tuning.__file__).parent / "tuned").glob("*.json")
    found = {
        tuple(v) for path in tables for k, v in json.loads(path.read_text()).items() if k.startswith("s")
    }
    shapes = [StreamShape(*numbers) for numbers in sorted(found, key=str)]
    return [
        shape for shape in shapes if ON_GPU or shape.bm <= 16
    ]  # the interpreter takes seconds for wide tiles


@pytest.mark.parametrize("shape", measured_shapes(), ids=str)
def test_measured_shapes(shape: StreamShape, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and outputs that do not fill their tiles; norm before, norm after, gate, and the largest product."""
    monkeypatch.setattr(fast, "_shape", lambda *_: shape)
    dtype, rows, n, k = DTYPES[0], shape.bm - 3, 2 * shape.bn + 24, 328
    x, weight = randn(rows, k, dtype=dtype, seed=0), randn(n, k, dtype=dtype, seed=1, scale=k**-0.5)
    gain, next_gain = randn(k, dtype=dtype, seed=2), randn(n, dtype=dtype, seed=3)
    gated_bytes = 2 * shape.stages * shape.bk * (shape.bm + 2 * shape.bn)
    for gate in (None, "silu") if gated_bytes <= 220 << 10 else (None,):  # the table has shapes for either
        expected = reference.small_linear(x.float(), weight.float(), norm=(gain, EPS), gate=gate)
        out = stream_linear(begin_stream(x, gain), weight, eps=EPS, gate=gate)
        assert error(out, expected) < 2 * tolerance(dtype)
    residual = randn(rows, n, dtype=dtype, seed=4)
    stream = add_linear(x, weight, begin_stream(residual, next_gain), next_gain)
    expected = reference.small_linear(x.float(), weight.float(), residual=residual.float())
    assert error(stream.x, expected) < 2 * tolerance(dtype)
    assert error(stream.squares.sum(0), stream.x.double().square().sum(1)) < 1e-5
    best = reference.small_linear(x.float(), weight.float(), norm=(gain, EPS))
    got = stream_argmax(begin_stream(x, gain), weight, eps=EPS)
    assert error(best.gather(1, got[:, None])[:, 0], best.amax(1)) < tolerance(dtype)


def test_groups_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """More tiles of rows than walk over the weights together."""
    monkeypatch.setattr(fast, "_shape", lambda *_: StreamShape(16, 64, 64, 2, 4, 3))
    dtype = DTYPES[0]
    x, weight = randn(300, 136, dtype=dtype, seed=0), randn(80, 136, dtype=dtype, seed=1, scale=0.1)
    assert error(stream_linear(x, weight), reference.small_linear(x, weight)) < 2 * tolerance(dtype)


@pytest.mark.parametrize("rows", [2, 20, 70])
def test_argmax(rows: int) -> None:
    """A row that is not finite answers -1 and touches no other."""
    dtype = DTYPES[0]
    x, weight = randn(rows, 128, dtype=dtype, seed=0), randn(999, 128, dtype=dtype, seed=1)
    gain = randn(128, dtype=dtype, seed=2)
    expected = reference.argmax_linear(x, weight, norm=(gain, EPS))
    last, at = torch.zeros(rows + 1, dtype=torch.int64, device=DEVICE), torch.arange(rows).flip(0)
    at = at.to(torch.int32).to(DEVICE)
    got = stream_argmax(begin_stream(x, gain), weight, eps=EPS, last_tokens=last, rows=at)
    assert torch.equal(got, expected)
    assert torch.equal(last[at.long()], expected) and last[rows] == 0
    x[rows - 1, 5] = torch.nan
    got = stream_argmax(begin_stream(x, gain), weight, eps=EPS)
    assert got[-1] == -1
    assert torch.equal(got[:-1], expected[:-1])
