"""Rows that pad a batch may hold NaN: the real ones come out bit for bit as without them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from headrace.kernels.linear import triton as small
from headrace.kernels.linear import triton_stream as stream
from headrace.kernels.linear import tuning
from headrace.kernels.linear.triton_stream import (
    Stream,
    add_linear,
    begin_stream,
    stream_argmax,
    stream_linear,
)
from headrace.kernels.linear.tuning import RingShape, StreamShape
from headrace.kernels.rotary import triton as rotary
from triton_device import DTYPES, ON_GPU, randn

DTYPE = DTYPES[-1]
REAL, ROWS, N, K = (
    5,
    13,
    136,
    352,
)  # K folds four times into rows of whole 16 bytes, as gluon_ring.covers asks
SHAPES: list[StreamShape | RingShape] = [
    StreamShape(16, 64, 64, 1, 4, 3),
    StreamShape(16, 64, 64, 3, 4, 3),
    StreamShape(16, 64, 64, 2, 4, 3, True),
]
if ON_GPU and torch.cuda.get_device_capability()[0] == 9:
    SHAPES += [
        RingShape(16, 64, 64, 1, 2, 3),
        RingShape(16, 16, 64, 4, 1, 2),
        RingShape(16, 8, 64, 4, 1, 2, True),
    ]


def two(make: Callable[[Tensor], list[Tensor]], x: Tensor) -> None:
    """``make`` of x as it is and with NaN from row REAL on: lists of tensors whose first rows must be equal."""
    broken = x.clone()
    broken[REAL:] = torch.nan
    for fine, poisoned in zip(make(x.clone()), make(broken)):
        assert torch.isfinite(fine[:REAL].float()).all()
        assert torch.equal(fine[:REAL], poisoned[:REAL])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_streams(shape: StreamShape | RingShape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_shape", lambda *_: shape)
    weight, gain = randn(N, K, dtype=DTYPE, seed=1, scale=K**-0.5), randn(K, dtype=DTYPE, seed=2)
    next_gain = randn(N, dtype=DTYPE, seed=3)

    def make(x: Tensor) -> list[Tensor]:
        normed = begin_stream(x, gain)
        residual: Stream = begin_stream(x[:, :N].contiguous(), next_gain)
        added = add_linear(x, weight, residual, next_gain)
        return [
            stream_linear(normed, weight, eps=1e-5),
            stream_linear(normed, weight, eps=1e-5, gate="silu"),
            added.x,
            added.scaled,
            added.squares.T,
            stream_argmax(normed, weight, eps=1e-5),
        ]

    two(make, randn(ROWS, K, dtype=DTYPE, seed=0))


def test_small_linear() -> None:
    weight, gain = randn(N, K, dtype=DTYPE, seed=1, scale=K**-0.5), randn(K, dtype=DTYPE, seed=2)

    def make(x: Tensor) -> list[Tensor]:
        norm = (gain, 1e-5)
        gated = small.small_linear(x, weight, norm=norm, gate="silu", residual=x[:, : N // 2].contiguous())
        return [gated, small.argmax_linear(x, weight, norm=norm)]

    two(make, randn(ROWS, K, dtype=DTYPE, seed=0))
    assert tuning.skinny_shape(weight.device, ROWS, N, K, True).bm >= ROWS


def test_heads() -> None:
    heads, dim = 12, 32
    gain = randn(heads, dim, dtype=DTYPE, seed=1)
    cos, sin = randn(ROWS, dim, dtype=torch.float32, seed=2), randn(ROWS, dim, dtype=torch.float32, seed=3)

    def make(x: Tensor) -> list[Tensor]:
        qk = x.view(ROWS, heads, dim)
        return [rotary.qk_norm_rope(qk.clone(), gain, 1e-6, cos, sin), rotary.rope(qk.clone(), cos, sin)]

    two(make, randn(ROWS, heads * dim, dtype=DTYPE, seed=0))
