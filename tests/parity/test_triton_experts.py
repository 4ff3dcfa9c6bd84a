"""Kernels of mixtures of experts against their reference."""

from __future__ import annotations

import pytest
import torch

from headrace.kernels.experts import reference
from headrace.kernels.experts import triton as fast
from headrace.kernels.experts.plan import ExpertPlan
from headrace.kernels.experts.triton_codes import expert_codes
from headrace.kernels.experts.tuning import ExpertCodesShape, ProductShape
from headrace.quantization import expert_device
from headrace.quantization.device import tiles
from headrace.quantization.experts import ScaledExperts
from headrace.quantization.scaled import Activations, QuantizedWeight, joined_linear
from headrace.quantization.schemes.fp4 import quantize_mxfp4, quantize_nvfp4
from headrace.quantization.schemes.fp8 import Fp8Weight, quantize_fp8
from headrace.quantization.schemes.group_int import GroupIntWeight, quantize_group_int
from headrace.quantization.tiled import TiledWeight, tile
from triton_device import DEVICE, DTYPES, ON_GPU, error, randn, tolerance

pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value"
)  # rows past the end, in numbers that are not kept


def choose(tokens: int, experts: int, top: int, seed: int = 0, skew: float = 1.0) -> torch.Tensor:
    """Random experts; ``skew`` above 1 makes some of them far likelier."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator) + skew * torch.randn(
        experts, generator=generator
    )
    return logits.topk(top).indices.to(torch.int32).to(DEVICE)


def check_plan(plan: ExpertPlan) -> None:
    """Every pair in one block of its expert, in order."""
    pairs, contents, by_pair = plan.pairs.cpu(), plan.contents.cpu(), plan.chosen.flatten().cpu()
    seen = []
    for block, held in enumerate(contents.tolist()):
        count, expert = divmod(held, 65536)
        assert 0 <= count <= plan.block
        assert (expert < plan.num_experts) == (count > 0)
        rows = pairs[block * plan.block : block * plan.block + count].long()
        assert (by_pair[rows] == expert).all()
        seen += [(expert, p) for p in rows.tolist()]
    assert seen == sorted(seen) and len(seen) == plan.num_pairs == len(set(seen))


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "top"), [(1, 8, 2), (5, 60, 4), (70, 128, 8), (3, 3, 3)])
def test_route(tokens: int, experts: int, top: int, renormalize: bool) -> None:
    logits = randn(tokens, experts, dtype=DTYPES[-1], seed=tokens) * 3
    logits[0, 1:] = logits[0, 1]  # equal ones
    got, want = (m.route(logits, top, renormalize=renormalize) for m in (fast, reference))
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-7)


def test_routes_of_wrong_numbers_stay_apart() -> None:
    logits = randn(6, 10, dtype=torch.float32, seed=1)
    clean = fast.route(logits, 4, renormalize=True)
    logits[1], logits[3, 2], logits[4, 5] = torch.nan, torch.nan, torch.inf
    weights, chosen = fast.route(logits, 4, renormalize=True)
    for row in (0, 2, 5):
        assert torch.equal(weights[row], clean[0][row]) and torch.equal(chosen[row], clean[1][row])
    assert not weights[1].isfinite().any() and not weights[3].isfinite().any()
    assert not weights[4].isfinite().all()
    assert all(len(set(row)) == 4 and max(row) < 10 for row in chosen.tolist())


@pytest.mark.parametrize(
    ("tokens", "experts", "top", "skew"),
    [
        (1, 8, 2, 1),
        (7, 128, 8, 1),
        (64, 60, 4, 3),
        (65, 5, 2, 3),
        (300, 16, 3, 5),
        (150, 3, 3, 1),
        (33, 2, 1, 0),
    ],
)
def test_plan(tokens: int, experts: int, top: int, skew: float) -> None:
    check_plan(fast.plan_experts(choose(tokens, experts, top, tokens, skew), experts))


def test_plan_of_one_expert_for_all() -> None:
    for tokens in (3, 64, 200):
        check_plan(fast.plan_experts(torch.full((tokens, 1), 6, dtype=torch.int32, device=DEVICE), 7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", [None, "silu", "clamped_swiglu", "gelu"])
@pytest.mark.parametrize(
    ("tokens", "experts", "top", "n", "k"), [(1, 6, 2, 40, 72), (9, 5, 3, 24, 64), (90, 3, 2, 72, 40)]
)
def test_products(
    tokens: int, experts: int, top: int, n: int, k: int, gate: str | None, dtype: torch.dtype
) -> None:
    plan = fast.plan_experts(choose(tokens, experts, top), experts)
    x = randn(tokens, k, dtype=dtype, seed=1)
    weight = randn(experts * n, k, dtype=dtype, seed=2, scale=2 * k**-0.5)
    bias = randn(experts * n, dtype=dtype, seed=3)
    for given in (None, bias):
        out = fast.expert_linear(x, weight, plan, bias=given, gate=gate)
        wide = reference.expert_linear(
            x.float(), weight.float(), plan, bias=None if given is None else given.float(), gate=gate
        )
        assert error(out, wide) < 2 * tolerance(dtype)
    back = randn(experts * 24, out.shape[1], dtype=dtype, seed=4, scale=0.2)
    by_pair = fast.expert_linear(out, back, plan)
    assert error(by_pair, reference.expert_linear(out.float(), back.float(), plan)) < 2 * tolerance(dtype)


def test_rows_are_the_same_in_any_company() -> None:
    dtype, experts, n, k = DTYPES[-1], 4, 72, 96
    x, weight = randn(80, k, dtype=dtype, seed=1), randn(experts * n, k, dtype=dtype, seed=2)
    chosen = choose(80, experts, 2, skew=3)
    together = fast.expert_linear(x, weight, fast.plan_experts(chosen, experts), gate="silu")
    for t in (0, 41, 79):
        alone = fast.expert_linear(
            x[t : t + 1], weight, fast.plan_experts(chosen[t : t + 1], experts), gate="silu"
        )
        assert torch.equal(alone, together[2 * t : 2 * t + 2])
    poisoned = x.clone()
    poisoned[3] = torch.nan
    out = fast.expert_linear(poisoned, weight, fast.plan_experts(chosen, experts), gate="silu")
    assert out[6:8].isnan().all()
    assert torch.equal(out[:6], together[:6]) and torch.equal(out[8:], together[8:])


@pytest.mark.parametrize("shape", [ProductShape(16, 16, 1, 1), ProductShape(128, 64, 4, 2)])
def test_shapes(shape: ProductShape) -> None:
    dtype = DTYPES[0]
    plan = fast.plan_experts(choose(21, 4, 2), 4)
    x, weight = randn(21, 80, dtype=dtype, seed=1), randn(4 * 48, 80, dtype=dtype, seed=2, scale=0.1)
    out = fast.expert_linear(x, weight, plan, gate="silu", shape=shape)
    assert error(out, reference.expert_linear(x, weight, plan, gate="silu")) < 2 * tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine(dtype: torch.dtype) -> None:
    parts, residual = randn(5 * 3, 1100, dtype=dtype, seed=1), randn(5, 1100, dtype=dtype, seed=2)
    weights = torch.rand(5, 3, device=DEVICE)
    for given in (None, residual):
        assert error(
            fast.combine(parts, weights, given), reference.combine(parts.float(), weights, given)
        ) < tolerance(dtype)


def int_weight(full: torch.Tensor, bits: int, group: int) -> GroupIntWeight:
    """With zero points of all kinds."""
    whole = quantize_group_int(full, bits, group)
    zero = torch.randint(0, 2**bits + 1, whole.zero.shape, device=DEVICE).float()
    return GroupIntWeight(whole.codes, whole.scale, zero, bits)


FORMS = {
    "fp8": (lambda w: quantize_fp8(w), Activations("token")),
    "fp8 of one scale": (
        lambda w: quantize_fp8(w, "tensor"),
        Activations("static", torch.tensor(0.02, device=DEVICE)),
    ),
    "fp8 in blocks": (lambda w: quantize_fp8(w, "block"), Activations("group")),
    "fp8 in small blocks": (lambda w: quantize_fp8(w, "block", (32, 64)), Activations("group")),
    "fp8 weights": (lambda w: quantize_fp8(w), Activations()),
    "fp8 weights in blocks": (lambda w: quantize_fp8(w, "block"), Activations()),
    "nvfp4": (quantize_nvfp4, Activations()),
    "mxfp4": (quantize_mxfp4, Activations()),
    "int8": (lambda w: int_weight(w, 8, w.shape[1]), Activations()),
    "int8 of 64": (lambda w: int_weight(w, 8, 64), Activations()),
    "int4": (lambda w: int_weight(w, 4, 32), Activations()),
    "int4 of 128, symmetric": (
        lambda w: quantize_group_int(w, 4, 128 if w.shape[1] % 128 == 0 else 32),
        Activations(),
    ),
}


def quantized(
    form: str, experts: int, n: int, k: int, dtype: torch.dtype, *, halves: int = 1
) -> ScaledExperts:
    """Experts whose gates and ups were quantized one by one, each of another size."""
    make, activations = FORMS[form]
    pieces: list[QuantizedWeight] = []
    for i in range(experts * halves):
        full = randn(n // halves, k, dtype=torch.float32, seed=i, scale=(1 + i % 3) * k**-0.5)
        pieces.append(make(full))
    bias = randn(experts * n, dtype=dtype, seed=99)
    joined = joined_linear(
        pieces,
        bias=bias,
        activations=[activations] * len(pieces),
        build=lambda *a, **b: ScaledExperts(*a, num_experts=experts, **b),
    )
    assert isinstance(joined, ScaledExperts)
    if DEVICE.type == "cpu":  # as a GPU holds them
        joined.hold(joined.quantized)
    return joined


def expected(module: ScaledExperts, x: torch.Tensor, plan: ExpertPlan, gate: str | None) -> torch.Tensor:
    """From dequantized weights and rounded rows, in float32."""
    rounded, bias = module.activations.rounded(x), module.bias.float()
    return reference.expert_linear(rounded, module.dequantize(), plan, bias=bias, gate=gate)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("tokens", "experts", "top", "n", "k", "gate"),
    [
        (1, 6, 2, 64, 192, "silu"),
        (40, 3, 2, 32, 128, None),
        (20, 2, 1, 64, 384, "clamped_swiglu"),
        *(
            [
                (600, 3, 1, 256, 512, "silu"),
                (150, 2, 1, 128, 448, None),
                (16, 32, 4, 256, 2880, "clamped_swiglu"),
                (64, 32, 4, 256, 2880, "clamped_swiglu"),
                (60, 16, 4, 256, 2048, "silu"),
            ]
            if ON_GPU
            else []
        ),
    ],
)
def test_fewer_bits(form: str, tokens: int, experts: int, top: int, n: int, k: int, gate: str | None) -> None:
    dtype = DTYPES[-1]
    module = quantized(form, experts, n, k, dtype, halves=1 if gate is None else 2)
    fp8 = isinstance(module.held, Fp8Weight) and module.activations.kind != "none"
    x = randn(tokens, k, dtype=dtype, seed=5)
    plan = fast.plan_experts(choose(tokens, experts, top), experts)
    out = expert_device.product(module, x, plan, gate)
    # Triton's interpreter rounds to FP8 otherwise than PyTorch (test_triton_quantized.py).
    limit = 0.05 if fp8 and DEVICE.type == "cpu" else 3 * tolerance(dtype)
    assert error(out, expected(module, x, plan, gate)) < limit
    by_pair = expert_device.product(module, x[:1].expand(plan.num_pairs, k).contiguous(), plan, None)
    every = x[:1].expand(plan.num_pairs, k).contiguous()
    assert error(by_pair, expected(module, every, plan, None)) < limit


@pytest.mark.parametrize("form", ["nvfp4", "mxfp4", "int4"])
@pytest.mark.parametrize(
    "shape",
    [
        ExpertCodesShape(8, 2, 1),
        ExpertCodesShape(16, 4, 2),
        ExpertCodesShape(32, 2, 4),
        ExpertCodesShape(32, 4, 4, True, 2),
    ],
    ids=str,
)
def test_shapes_of_codes(form: str, shape: ExpertCodesShape) -> None:
    dtype, tokens = DTYPES[-1], 33
    module = quantized(form, 2, 64, 160, dtype, halves=2)
    x = randn(tokens, 160, dtype=dtype, seed=5)
    plan = fast.plan_experts(choose(tokens, 2, 1, skew=3), 2)
    assert isinstance(module.held, TiledWeight) and plan.block == 32
    out = expert_codes(
        x, plan=plan, rows=128, bias=module.bias, gate="silu", shape=shape, **tiles(module.held)
    )
    assert error(out, expected(module, x, plan, "silu")) < 2 * tolerance(dtype)
    back = quantized(form, 2, 48, 160, dtype)
    out = expert_codes(x, plan=plan, rows=96, shape=shape, **tiles(back.held))
    back.bias.zero_()
    assert error(out, expected(back, x, plan, None)) < 2 * tolerance(dtype)


@pytest.mark.parametrize(("tokens", "top", "k"), [(11, 1, 160), (20, 1, 96), (9, 2, 256), (70, 1, 160)])
def test_chosen_shapes(tokens: int, top: int, k: int) -> None:
    """Blocks that are fuller than there are tokens, columns that fill no chunk, and all others."""
    dtype = DTYPES[-1]
    module = quantized("mxfp4", 2, 64, k, dtype, halves=2)
    x = randn(tokens, k, dtype=dtype, seed=5)
    plan = fast.plan_experts(choose(tokens, 2, top, skew=3), 2)
    out = expert_device.product(module, x, plan, "silu")
    assert error(out, expected(module, x, plan, "silu")) < 2 * tolerance(dtype)


def test_halves_within_a_tile() -> None:
    """Gates and ups of 40 rows: an expert ends with a tile, its halves do not."""
    module = quantized("nvfp4", 3, 80, 64, DTYPES[-1])
    x = randn(9, 64, dtype=DTYPES[-1], seed=5)
    plan = fast.plan_experts(choose(9, 3, 2), 3)
    assert error(
        expert_device.product(module, x, plan, "silu"), expected(module, x, plan, "silu")
    ) < 2 * tolerance(DTYPES[-1])


def test_tiles_of_experts_come_back() -> None:
    module = quantized("mxfp4", 4, 48, 160, DTYPES[-1])
    assert torch.equal(module.quantized.dequantize(), tile(module.quantized).restore().dequantize())
