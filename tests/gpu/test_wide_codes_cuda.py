"""Products of hundreds of rows over FP4 codes (kernels/quantized_linear/gluon_wide.py, which has no interpreter)."""

from __future__ import annotations

import pytest
import torch

from headrace.kernels.experts import plan_experts, reference
from headrace.kernels.experts.triton_codes import expert_codes
from headrace.kernels.experts.tuning import WIDE, ExpertCodesShape
from headrace.kernels.launch import supports_gluon
from headrace.kernels.quantized_linear.gluon_wide import wide_product
from headrace.kernels.quantized_linear.tuning import WideShape, covers_wide, wide_shape
from headrace.quantization import device
from headrace.quantization.schemes.fp4 import quantize_mxfp4, quantize_nvfp4
from headrace.quantization.tiled import tile
from support.row_scales import times

CUDA = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not supports_gluon(CUDA), reason="needs Hopper and Gluon"
    ),
]
SHAPES = (
    WideShape(8, 128, 1, 8, 4),
    WideShape(16, 128, 1, 8, 3),
    WideShape(8, 256, 1, 8, 4),
    WideShape(4, 64, 2, 4, 2),
    WideShape(8, 64, 4, 8, 4),
    WideShape(8, 32, 8, 8, 4),
    WideShape(4, 128, 4, 4, 4),
    WideShape(8, 256, 2, 8, 4),
)


def poison() -> None:
    """What is allocated next is NaN where nobody writes."""
    held = [torch.full((1 << 20,), torch.nan, device=CUDA) for _ in range(8)]
    del held


@pytest.mark.parametrize("form", [quantize_nvfp4, quantize_mxfp4])
@pytest.mark.parametrize(
    ("rows", "n", "k"),
    [
        (33, 144, 320),
        (64, 256, 2880),
        (65, 48, 64),
        (100, 272, 192),
        (128, 128, 128),
        (300, 1040, 2880),
        (512, 4096, 1024),
        (1000, 520, 448),
    ],
)
def test_against_dequantized_weights(form: object, rows: int, n: int, k: int) -> None:
    generator = torch.Generator(device=CUDA).manual_seed(rows + n)
    full = torch.randn(n, k, device=CUDA, generator=generator) * k**-0.5
    weight = times(form(full), torch.rand(n, device=CUDA, generator=generator) + 0.5)  # type: ignore[operator]
    tiled = tile(weight)
    wide = torch.full((rows, k + 8), torch.nan, dtype=torch.bfloat16, device=CUDA)
    wide[:, :k] = torch.randn(rows, k, device=CUDA, generator=generator)
    x = wide[:, :k]
    bias = torch.randn(n, device=CUDA, generator=generator).bfloat16()
    residual = torch.randn(rows, n, device=CUDA, generator=generator).bfloat16()
    assert covers_wide(x, tiled.group, tiled.small)
    want = x.float() @ weight.dequantize().float().t()
    extras = ({}, {"bias": bias}, {"bias": bias, "residual": residual})
    for i, extra in enumerate(extras):
        poison()
        shape = SHAPES[(rows + i) % len(SHAPES)] if i else wide_shape(CUDA, rows, n, k)
        assert shape is not None
        out = wide_product(
            x, tiled.words, tiled.scale, tiled.row_scale, rows=n, group=tiled.group, shape=shape, **extra
        )
        exact = want + sum(part.float() for part in extra.values())
        error = (out.float() - exact).abs().max() / exact.abs().max()
        assert error < 6e-3, (shape, float(error))


def test_rows_do_not_harm_one_another() -> None:
    weight = tile(quantize_nvfp4(torch.randn(256, 512, device=CUDA)))
    x = torch.randn(200, 512, device=CUDA).bfloat16()
    whole = wide_product(x, weight.words, weight.scale, weight.row_scale, rows=256, group=16, shape=SHAPES[0])
    x[77] = torch.nan
    out = wide_product(x, weight.words, weight.scale, weight.row_scale, rows=256, group=16, shape=SHAPES[0])
    assert out[77].isnan().all()
    rest = torch.arange(200, device=CUDA) != 77
    assert torch.equal(out[rest], whole[rest])


@pytest.mark.parametrize("form", [quantize_nvfp4, quantize_mxfp4])
@pytest.mark.parametrize(
    ("tokens", "experts", "top", "n", "k", "gate"),
    [
        (33, 2, 1, 96, 192, "silu"),
        (100, 2, 1, 160, 704, "clamped_swiglu"),
        (50, 5, 3, 288, 2880, "clamped_swiglu"),
        (300, 4, 2, 544, 448, "gelu"),
        (900, 3, 2, 272, 320, None),
    ],
)
def test_experts(form: object, tokens: int, experts: int, top: int, n: int, k: int, gate: str | None) -> None:
    generator = torch.Generator(device=CUDA).manual_seed(tokens)
    full = torch.randn(experts * n, k, device=CUDA, generator=generator) * k**-0.5
    weight = times(form(full), torch.rand(experts * n, device=CUDA, generator=generator) + 0.5)  # type: ignore[operator]
    tiled, dense = tile(weight), weight.dequantize().float()
    bias = torch.randn(experts * n, device=CUDA, generator=generator).bfloat16()
    x = torch.randn(tokens, k, device=CUDA, generator=generator).bfloat16()
    chances = torch.randn(tokens, experts, device=CUDA, generator=generator) + torch.arange(
        experts, device=CUDA
    )
    plan = plan_experts(chances.topk(top).indices.int(), experts)  # some experts are far likelier
    want = reference.expert_linear(x.float(), dense, plan, bias=bias.float(), gate=gate)
    for tiles_of, warps in ((16, 8), (8, 4)) if gate else ((16, 8), (8, 8)):
        poison()
        shape = ExpertCodesShape(plan.block, tiles_of, warps, WIDE, 4)
        out = expert_codes(
            x, plan=plan, rows=experts * n, bias=bias, gate=gate, shape=shape, **device.tiles(tiled)
        )
        assert (out.float() - want).abs().max() < 1e-2 * want.abs().max(), shape
    pairs = torch.randn(plan.num_pairs, k, device=CUDA, generator=generator).bfloat16()
    shape = ExpertCodesShape(plan.block, 8, 8, WIDE, 3)
    out = expert_codes(pairs, plan=plan, rows=experts * n, shape=shape, **device.tiles(tiled))
    want = reference.expert_linear(pairs.float(), dense, plan)
    assert (out.float() - want).abs().max() < 1e-2 * want.abs().max()
