"""Maps whose weights are loaded ahead (gluon_ring.py) against the reference. Gluon has no interpreter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from headrace.kernels.launch import supports_gluon
from headrace.kernels.linear import reference, tuning
from headrace.kernels.linear.tuning import RingShape
from triton_device import DEVICE, error, randn, tolerance

if not supports_gluon(torch.device(DEVICE)):
    pytest.skip("needs a Hopper GPU, and the Triton that Gluon is used in", allow_module_level=True)

from headrace.kernels.linear import triton_stream as fast
from headrace.kernels.linear.triton_stream import add_linear, begin_stream, stream_argmax, stream_linear
from support.replay import always_the_same

pytestmark = pytest.mark.gpu
EPS = 1e-5
DTYPE = torch.bfloat16
SHAPES = [  # one tile deep, rings that go round, splits of which one is short or empty, every fold
    RingShape(16, 64, 64, 1, 1, 3),
    RingShape(16, 64, 128, 1, 3, 2),
    RingShape(16, 32, 64, 2, 1, 4),
    RingShape(16, 16, 64, 4, 2, 2),
    RingShape(16, 8, 64, 8, 1, 2),
    RingShape(8, 64, 64, 1, 2, 3),
    RingShape(8, 8, 128, 8, 1, 2),
    RingShape(32, 64, 64, 1, 2, 2),
    RingShape(64, 128, 64, 1, 1, 2),
    RingShape(64, 32, 64, 2, 2, 2),
    RingShape(64, 16, 64, 1, 2, 3, True),
    RingShape(32, 32, 128, 2, 1, 2, True),
    RingShape(16, 8, 64, 4, 1, 3, True),
]


def measured() -> list[RingShape]:
    """Every shape that a GPU was measured with, once."""
    tables = [
        json.loads(p.read_text()) for p in sorted((Path(tuning.__file__).parent / "tuned").glob("*.json"))
    ]
    found = {tuple(v) for table in tables for k, v in table.items() if k.startswith("r")}
    return [RingShape(*numbers) for numbers in sorted(found)]


@pytest.mark.parametrize("shape", [*SHAPES, *measured()], ids=str)
def test_ring(shape: RingShape, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, outputs and columns that do not fill their tiles; each twice, for the counters must be reset."""
    monkeypatch.setattr(fast, "_shape", lambda *_: shape)
    rows, n, k = shape.bm - 3, 2 * shape.bn + 24, 328 * shape.fold
    x, weight = randn(rows, k, dtype=DTYPE, seed=0), randn(n, k, dtype=DTYPE, seed=1, scale=k**-0.5)
    gain, next_gain = randn(k, dtype=DTYPE, seed=2), randn(n, dtype=DTYPE, seed=3)
    bias = randn(n, dtype=DTYPE, seed=5)
    stage = 2 * shape.bk * shape.fold * (shape.bm + 2 * shape.bn)
    for gate in (None, "silu", "gelu") if stage * shape.stages <= 220 << 10 else (None,):
        expected = reference.small_linear(x.float(), weight.float(), norm=(gain, EPS), gate=gate, bias=bias)
        for _ in range(2):
            out = stream_linear(begin_stream(x, gain), weight, eps=EPS, gate=gate, bias=bias)
            assert error(out, expected) < 2 * tolerance(DTYPE)
    residual = randn(rows, n, dtype=DTYPE, seed=4)
    stream = add_linear(x, weight, begin_stream(residual, next_gain), next_gain)
    expected = reference.small_linear(x.float(), weight.float(), residual=residual.float())
    assert error(stream.x, expected) < 2 * tolerance(DTYPE)
    assert torch.equal(stream.scaled, (stream.x.float() * next_gain.float()).to(DTYPE))
    assert error(stream.squares.sum(0), stream.x.double().square().sum(1)) < 1e-5
    best = reference.small_linear(x.float(), weight.float(), norm=(gain, EPS))
    got = stream_argmax(begin_stream(x, gain), weight, eps=EPS)
    assert error(best.gather(1, got[:, None])[:, 0], best.amax(1)) < tolerance(DTYPE)


@pytest.mark.parametrize("shape", [RingShape(8, 16, 128, 4, 1, 4), RingShape(8, 128, 128, 1, 1, 3)], ids=str)
def test_one_row(shape: RingShape, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rows of a tile are not there; what lies behind x must not matter."""
    monkeypatch.setattr(fast, "_shape", lambda *_: shape)
    n, k = 3 * shape.bn + 8, 1024
    x = torch.full((9, k), torch.nan, dtype=DTYPE, device="cuda")
    x[0] = randn(1, k, dtype=DTYPE, seed=0)[0]
    weight, gain = randn(n, k, dtype=DTYPE, seed=1, scale=k**-0.5), randn(k, dtype=DTYPE, seed=2)
    one = x[:1]
    expected = reference.small_linear(one.float(), weight.float(), norm=(gain, EPS))
    assert error(stream_linear(begin_stream(one, gain), weight, eps=EPS), expected) < 2 * tolerance(DTYPE)
    residual = randn(1, n, dtype=DTYPE, seed=3)
    stream = add_linear(one, weight, begin_stream(residual, randn(n, dtype=DTYPE, seed=4)), gain[:n])
    expected = reference.small_linear(one.float(), weight.float(), residual=residual.float())
    assert error(stream.x, expected) < 2 * tolerance(DTYPE)
    best = reference.small_linear(one.float(), weight.float(), norm=(gain, EPS))
    token = int(stream_argmax(begin_stream(one, gain), weight, eps=EPS)[0])
    assert error(best[0, token], best.amax()) < tolerance(DTYPE)


def test_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of dependent maps, each of which starts while the one before it runs, many times: always the same."""
    shapes = {False: RingShape(16, 16, 128, 4, 1, 3), True: RingShape(16, 16, 128, 4, 2, 2)}
    monkeypatch.setattr(fast, "_shape", lambda x, weight, gated: shapes[gated])
    width, inner, layers = 1024, 3072, 12
    gain = randn(width, dtype=DTYPE, seed=0)
    ups = [randn(2 * inner, width, dtype=DTYPE, seed=10 + i, scale=width**-0.5) for i in range(layers)]
    downs = [randn(width, inner, dtype=DTYPE, seed=50 + i, scale=inner**-0.5) for i in range(layers)]
    x = randn(13, width, dtype=DTYPE, seed=1)

    def chain() -> torch.Tensor:
        stream = begin_stream(x, gain)
        for up, down in zip(ups, downs):
            stream = add_linear(stream_linear(stream, up, eps=EPS, gate="silu"), down, stream, gain)
        return stream.x

    expected = x.float()
    for up, down in zip(ups, downs):
        hidden = reference.small_linear(expected, up.float(), norm=(gain, EPS), gate="silu")
        expected = reference.small_linear(hidden, down.float(), residual=expected)
    first = always_the_same(chain)
    assert error(first, expected) < 2e-2


def test_argmax_of_rows_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "_shape", lambda *_: RingShape(16, 128, 64, 1, 1, 4))
    x, weight = randn(9, 128, dtype=DTYPE, seed=0), randn(999, 128, dtype=DTYPE, seed=1)
    gain = randn(128, dtype=DTYPE, seed=2)
    expected = stream_argmax(begin_stream(x, gain), weight, eps=EPS)
    x[8, 5] = torch.nan
    got = stream_argmax(begin_stream(x, gain), weight, eps=EPS)
    assert got[-1] == -1
    assert torch.equal(got[:-1], expected[:-1])
