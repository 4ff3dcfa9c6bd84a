"""Packed linears against float32 products of the dequantized weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.checkpoints.base import PackedTensor
from headrace.checkpoints.gguf_blocks import dequantize
from headrace.checkpoints.gguf_header import BLOCKS
from headrace.errors import UnsupportedCheckpoint
from headrace.quantization.ggml import KEEPABLE, PackedEmbedding, PackedHead, packed_linear
from headrace.quantization.linear import JoinedLinear
from headrace.quantization.schemes.int4 import ROW_BLOCK, Int4Linear, Int4Weight, quantize_int4
from headrace.quantization.schemes.int8 import Int8Linear, quantize_int8

BF16_STEP = 2.0**-8
HALF_FIELDS = {  # byte offsets of float16 fields in a block
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "MXFP4": (),
}


def blocks(ggml_type: str, rows: int, columns: int, seed: int) -> PackedTensor:
    """Every bit random, but finite scales of a trained model's size."""
    generator = torch.Generator().manual_seed(seed)
    elements, size = BLOCKS[ggml_type]
    raw = torch.randint(0, 256, (rows * columns // elements, size), generator=generator, dtype=torch.uint8)
    for at in HALF_FIELDS[ggml_type]:
        scale = torch.rand(raw.shape[0], 1, generator=generator) * 0.01 + 0.001
        sign = torch.randint(0, 2, scale.shape, generator=generator) * 2 - 1
        raw[:, at : at + 2] = (scale * sign).half().view(torch.uint8)
    if ggml_type == "MXFP4":
        raw[:, 0] = raw[:, 0] % 8 + 118
    return PackedTensor(ggml_type, raw.view(rows, -1), (rows, columns))


def dense(tensor: PackedTensor) -> Tensor:
    return dequantize(tensor.raw, tensor.ggml_type)


def assert_product(linear: torch.nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """One rounding to bfloat16 at the end, and what float32 sums in another order may differ by."""
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    out = linear(x)
    assert out.dtype == x.dtype
    assert out.shape == expected.shape
    slack = 1e-6 * F.linear(x.double().abs(), weight.double().abs())
    roundings = 1 if bias is None else 2
    bound = roundings * BF16_STEP * (expected.abs() + (0 if bias is None else bias.abs())) + slack
    assert ((out.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("ggml_type", sorted(KEEPABLE))
def test_codes_are_kept_and_scales_rounded_to_bfloat16(ggml_type: str) -> None:
    tensor = blocks(ggml_type, 48, 512, seed=1)
    weight = dense(tensor)
    kept = packed_linear([tensor]).dequantize()
    # A group's largest weight is rounded like any bfloat16; the others carry the same absolute error at most.
    size = 16 if ggml_type in ("Q2_K", "Q3_K", "Q6_K") else 32
    reach = weight.view(48, -1, size).abs().amax(-1, keepdim=True).expand(-1, -1, size).reshape(48, 512)
    spread = weight.view(48, -1, size)
    spread = (spread.amax(-1) - spread.amin(-1)).repeat_interleave(size, dim=1)
    assert ((kept - weight).abs() <= (reach + spread) * BF16_STEP).all()


@pytest.mark.parametrize("ggml_type", sorted(KEEPABLE))
def test_scales_that_bfloat16_holds_lose_nothing(ggml_type: str) -> None:
    tensor = blocks(ggml_type, 32, 256, seed=2)
    if ggml_type in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"):
        pytest.skip("their scales are products of more than 8 bits")
    for at in HALF_FIELDS[ggml_type]:
        value = 0.0 if at == 2 else 2.0**-7
        flat = tensor.raw.view(-1, BLOCKS[ggml_type][1])
        flat[:, at : at + 2] = torch.tensor(value).half().view(1).view(torch.uint8)
    kept = packed_linear([tensor]).dequantize()
    # Centering Q8_0 (by 8) and Q5_1 (by 16) leaves an offset that is no bfloat16 number.
    allowed = {"Q8_0": 8, "Q5_1": 16}.get(ggml_type, 0) * 2.0**-7 * 2.0**-9
    assert (kept - dense(tensor)).abs().max() <= allowed


@pytest.mark.parametrize("ggml_type", sorted(KEEPABLE))
@pytest.mark.parametrize(("rows", "columns"), [(16, 256), (50, 512), (130, 768)])
def test_product(ggml_type: str, rows: int, columns: int) -> None:
    linear = packed_linear([blocks(ggml_type, rows, columns, seed=3)])
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(4)).bfloat16()
    assert_product(linear, x, linear.dequantize())


def test_rows_do_not_depend_on_their_neighbours_or_threads() -> None:
    linear = packed_linear([blocks("Q4_1", 200, 576, seed=5)])
    head = packed_linear([blocks("Q8_0", 200, 576, seed=6)])
    x = torch.randn(33, 576).bfloat16()
    threads = torch.get_num_threads()
    for module in (linear, head):
        whole = module(x)
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                for rows in (1, 2, 3, 4, 5, 7, 8, 17, 32):
                    assert torch.equal(module(x[:rows]), whole[:rows])
                    assert torch.equal(module(x[-rows:]), whole[-rows:])
        finally:
            torch.set_num_threads(threads)


def test_fused_rows_of_one_and_of_several_formats() -> None:
    q, k, v = (
        blocks(t, rows, 256, seed=i) for i, (t, rows) in enumerate([("Q4_K", 72), ("Q4_K", 24), ("Q6_K", 24)])
    )
    bias = torch.randn(120)
    x = torch.randn(3, 256)
    fused, alone = packed_linear([q, k]), [packed_linear([t]) for t in (q, k)]
    assert isinstance(fused, Int4Linear)
    assert fused.parts == (72, 24)
    assert torch.equal(fused(x), torch.cat([linear(x) for linear in alone], -1))
    mixed = packed_linear([q, k, v], bias=bias)
    assert isinstance(mixed, JoinedLinear)
    assert mixed.parts == (72, 24, 24)
    assert (mixed.in_features, mixed.out_features) == (256, 120)
    assert_product(mixed, x.bfloat16(), mixed.dequantize(), bias.bfloat16())


def test_chunks_of_rows_pack_as_the_whole_does() -> None:
    values = torch.randint(-8, 8, (3 * ROW_BLOCK + 20, 2, 32), dtype=torch.int8)
    scale, offset = torch.rand(values.shape[0], 2), torch.randn(values.shape[0], 2)
    whole = Int4Weight.one_plane(values, scale, offset, low=-8)
    cuts = [slice(0, ROW_BLOCK), slice(ROW_BLOCK, 3 * ROW_BLOCK), slice(3 * ROW_BLOCK, None)]
    pieces = [Int4Weight.one_plane(values[c], scale[c], offset[c], low=-8) for c in cuts]
    joined = Int4Weight.joined(pieces, sum(piece.rows for piece in pieces))
    assert torch.equal(joined.codes, whole.codes)
    assert torch.equal(joined.scales, whole.scales)
    assert joined.rows == whole.rows


def test_every_value_of_two_planes() -> None:
    values = torch.arange(-128, 128).to(torch.int8).view(8, 1, 32).expand(8, 2, 32)
    ones = torch.ones(8, 2)
    linear = Int4Linear(Int4Weight.two_planes(values, ones, None, center=8))
    # The offset of 8 is stored as 8 / 17, to 2**-9 of itself.
    assert (linear.dequantize() - values.flatten(1).float()).abs().max() <= 8 * 2.0**-9
    exact = Int4Linear(Int4Weight.two_planes(values.clamp(max=119), ones, None, center=0))
    assert torch.equal(exact.dequantize(), values.clamp(max=119).flatten(1).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeps_the_type_and_shape_of_its_input(dtype: torch.dtype) -> None:
    linear = packed_linear([blocks("Q4_0", 40, 64, seed=7)])
    x = torch.randn(2, 3, 64).to(dtype)
    out = linear(x)
    assert out.dtype == dtype
    assert out.shape == (2, 3, 40)
    assert torch.equal(out, linear(x.bfloat16()).to(dtype))


def test_memory_is_about_the_file_s() -> None:
    for ggml_type, most in (
        ("Q4_1", 1.0),
        ("Q4_0", 1.12),
        ("Q4_K", 1.12),
        ("Q8_0", 1.06),
        ("Q5_K", 1.64),
        ("Q6_K", 1.53),
    ):
        tensor = blocks(ggml_type, 128, 1024, seed=8)
        assert packed_linear([tensor]).nbytes <= most * tensor.raw.nbytes


def test_formats_that_cannot_be_kept_are_refused() -> None:
    raw = torch.zeros(4, 66, dtype=torch.uint8)
    with pytest.raises(UnsupportedCheckpoint, match=r"IQ2_XXS.*Q4_K"):
        packed_linear([PackedTensor("IQ2_XXS", raw, (4, 256))])


def test_embedding_rows_are_exact() -> None:
    tensor = blocks("Q8_0", 100, 96, seed=9)
    ids = torch.tensor([3, 99, 3, 0])
    assert torch.equal(PackedEmbedding(tensor, dtype=torch.float32)(ids), dense(tensor)[ids])
    scaled = PackedEmbedding(tensor, scale=2.0, dtype=torch.bfloat16)(ids)
    assert torch.equal(scaled, dense(tensor)[ids].bfloat16() * 2)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_rounds_to_nearest(group: int) -> None:
    weight = torch.randn(40, 256) * torch.rand(40, 1)
    linear = Int4Linear(quantize_int4(weight, group))
    kept = linear.dequantize()
    grouped, error = weight.view(40, -1, group), (kept - weight).view(40, -1, group)
    step = (grouped.amax(-1) - grouped.amin(-1)) / 15
    # Plain rounding over the whole range has a mean squared error of step ** 2 / 12; shrinking only helps.
    assert (error.square().mean(-1) <= (1.05 * step).square() / 12 * 1.3).all()
    assert error.square().mean() < 0.95 * (step.square() / 12).mean()
    assert_product(linear, torch.randn(3, 256).bfloat16(), kept)


def test_int4_keeps_constant_groups_and_refuses_odd_columns() -> None:
    weight = torch.full((16, 64), 0.375)
    assert (Int4Linear(quantize_int4(weight)).dequantize() - 0.375).abs().max() <= 0.375 * 2.0**-8
    assert torch.equal(
        Int4Linear(quantize_int4(torch.zeros(16, 64))).dequantize().abs() < 1e-20, torch.ones(16, 64) > 0
    )
    with pytest.raises(UnsupportedCheckpoint, match=r"int4 groups of 128 .* 96 columns; use one of \[32\]"):
        quantize_int4(torch.randn(16, 96), 128)
    with pytest.raises(UnsupportedCheckpoint, match="int8"):
        quantize_int4(torch.randn(16, 40), 32)


@pytest.mark.parametrize(("rows", "columns"), [(7, 32), (64, 576), (130, 96)])
def test_int8_rounds_to_nearest(rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns)
    bias = torch.randn(rows)
    linear = Int8Linear(*quantize_int8(weight), bias=bias)
    kept = linear.dequantize()
    half_step = weight.abs().amax(1, keepdim=True) * (1 + 2.0**-7) / 254
    assert ((kept - weight).abs() <= half_step * 1.001).all()
    for count in (1, 2, 9):
        assert_product(linear, torch.randn(count, columns).bfloat16(), kept, bias.bfloat16())


def test_int8_refuses_columns_that_its_kernel_cannot_read() -> None:
    with pytest.raises(UnsupportedCheckpoint, match=r"multiple of 32 .* \[8, 40\]"):
        quantize_int8(torch.randn(8, 40))


@pytest.mark.parametrize("rows", [40, 1000])
def test_a_head_does_not_tie_its_best_tokens(rows: int) -> None:
    tensor = blocks("Q8_0", rows, 64, seed=5)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(6)).to(torch.bfloat16)
    exact = x.float() @ dense(tensor).T
    logits = PackedHead(tensor)(x)
    assert logits.dtype == torch.float32
    best = exact.topk(20).indices
    torch.testing.assert_close(logits.gather(1, best), exact.gather(1, best), atol=1e-4, rtol=1e-5)
    assert torch.equal(logits.argmax(1), exact.argmax(1))
    assert (packed_linear([tensor])(x).float() - exact).abs().max() > (logits - exact).gather(
        1, best
    ).abs().max()
