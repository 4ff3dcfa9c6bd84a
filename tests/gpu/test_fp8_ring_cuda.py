"""Rings over FP8 weights against plain arithmetic on the same codes. Gluon has no interpreter: these need a GPU."""

from __future__ import annotations

import pytest
import torch

from headrace.kernels.launch import supports_gluon
from headrace.kernels.linear.tuning import RingShape
from headrace.kernels.quantized_linear import triton as products
from headrace.kernels.quantized_linear import tuning
from support.replay import always_the_same
from triton_device import error, randn

CUDA = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not supports_gluon(CUDA),
        reason="needs a Hopper GPU, and the Triton that Gluon is used in",
    ),
]
# bm, bn, bk, fold, splits, stages
SHAPES = [
    RingShape(8, 16, 128, 4, 1, 6),
    RingShape(8, 32, 128, 2, 2, 4),
    RingShape(16, 16, 128, 4, 1, 4),
    RingShape(16, 32, 128, 2, 2, 3),
    RingShape(16, 64, 128, 1, 1, 4),
    RingShape(32, 32, 128, 2, 1, 4),
    RingShape(32, 64, 64, 1, 3, 4),
    RingShape(64, 64, 128, 1, 1, 4),
    RingShape(64, 64, 128, 1, 4, 3),
]


def quantized(rows: int, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [rows, k] and their scales [rows, 1], of rows of different size."""
    x = randn(rows, k, dtype=torch.float32, seed=seed) * (1 + torch.arange(rows, device=CUDA) % 5)[:, None]
    scale = x.abs().amax(1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn), scale


def fp8(codes: torch.Tensor, row_scale: torch.Tensor) -> products.EightBitWeight:
    return products.EightBitWeight(products.FP8, codes, row_scale, row_scale=row_scale)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ring(shape: RingShape, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, outputs and columns that do not fill their tiles; each twice, for the counters must be reset."""
    monkeypatch.setattr(tuning, "fp8_ring_shape", lambda *_: shape)
    rows, n, k = shape.bm - 3, 2 * shape.bn + 24, 656 * shape.fold
    x, x_scale = quantized(rows, k, 0)
    weight, row_scale = quantized(2 * n, k, 1)
    row_scale = (row_scale * k**-0.5).flatten()
    bias, residual = (randn(*size, dtype=torch.bfloat16, seed=2) for size in ((2 * n,), (rows, n)))
    options = {"x_scale": x_scale, "out_dtype": torch.bfloat16}
    wide = (x.float() * x_scale) @ (weight.float() * row_scale[:, None]).T
    for _ in range(2):
        out = products.small_product(x, fp8(weight, row_scale), gate="silu", bias=bias, **options)
        first, second = (wide + bias.float()).chunk(2, 1)
        assert error(out, torch.nn.functional.silu(first) * second) < 6e-3
        half = fp8(weight[:n], row_scale[:n])
        out = products.small_product(x, half, residual=residual, **options)
        assert error(out, wide[:, :n] + residual.float()) < 6e-3
    options["x_scale"] = torch.tensor(0.25, device=CUDA)
    out = products.small_product(x, half, **options)
    assert error(out, wide[:, :n] / x_scale * 0.25) < 6e-3


def test_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of rounding and products, each of which starts while the one before it runs, always gives the same."""
    shapes = {True: RingShape(16, 32, 128, 2, 1, 4), False: RingShape(16, 16, 128, 4, 1, 4)}
    monkeypatch.setattr(tuning, "fp8_ring_shape", lambda *facts: shapes[facts[-1]])
    ups = [quantized(2 * 3072, 1024, 10 + i) for i in range(4)]
    downs = [quantized(1024, 3072, 50 + i) for i in range(4)]
    start = randn(13, 1024, dtype=torch.bfloat16, seed=1)

    def chain() -> torch.Tensor:
        x = start
        for (up, up_scale), (down, down_scale) in zip(ups, downs):
            for weight, scale, gate, residual in ((up, up_scale, "silu", None), (down, down_scale, None, x)):
                # Without a norm values square from layer to layer, and leave bfloat16 within a few.
                norm = (torch.ones(x.shape[1], dtype=x.dtype, device=CUDA), 1e-6)
                codes, x_scale = products.quantize_rows(x, norm=norm)
                rows = scale.flatten() * weight.shape[1] ** -0.5
                x = products.small_product(
                    codes, fp8(weight, rows), x_scale=x_scale, gate=gate, residual=residual,
                    out_dtype=torch.bfloat16,
                )  # fmt: skip
        return x

    first = always_the_same(chain)
    monkeypatch.setattr(tuning, "fp8_ring_shape", lambda *_: None)
    assert error(first, chain()) < 0.1  # sums that differ in their last bits round to other codes
