"""Triton kernels of encoders against their references."""

from __future__ import annotations

import pytest
import torch

import triton_device
from headrace.kernels.activation import reference as activation_reference
from headrace.kernels.activation import triton as activation
from headrace.kernels.attention import reference as attention_reference
from headrace.kernels.attention.triton_packed import packed_attention
from headrace.kernels.biased_attention import reference as biased_reference
from headrace.kernels.dense import reference as dense_reference
from headrace.kernels.dense import triton as dense
from headrace.kernels.dense import triton_product
from headrace.kernels.dense.triton_product import Shape, fused_product, takes
from headrace.kernels.launch import supports_gluon
from headrace.kernels.norm import reference as norm_reference
from headrace.kernels.norm import triton as norms
from headrace.kernels.pooling import reference as pooling_reference
from headrace.kernels.pooling import triton as pooling
from headrace.layers.packed import AttentionBatch
from triton_device import DEVICE, DTYPES, error, randn, tolerance

NAMES = ["gelu", "gelu_tanh", "silu", "relu", "tanh", "relu2"]


def batch_of(lens: list[int], causal: bool = False) -> AttentionBatch:
    starts = torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    return AttentionBatch(
        query_starts=starts,
        seq_lens=torch.tensor(lens, dtype=torch.int32, device=DEVICE),
        causal=causal,
        max_query_len=max(lens),
        max_seq_len=max(lens),
    )


def qkv_of(
    lens: list[int], heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """Views of one fused projection."""
    fused = randn(sum(lens), heads + 2 * kv_heads, dim, dtype=dtype, seed=len(lens))
    return fused.split([heads, kv_heads, kv_heads], 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_bias_activate(name: str, bias: bool, dtype: torch.dtype) -> None:
    x, row = randn(3, 1100, dtype=dtype, seed=0), randn(1100, dtype=dtype, seed=1) if bias else None
    expected = activation_reference.bias_activate(x, row, name)
    assert error(activation.bias_activate(x.clone(), row, name), expected) < tolerance(dtype)


@pytest.mark.parametrize("name", [None, "gelu"])
@pytest.mark.parametrize("bias", [True, False])
def test_dense(bias: bool, name: str | None) -> None:
    dtype = DTYPES[0]
    x, weight = randn(5, 48, dtype=dtype, seed=0), randn(70, 48, dtype=dtype, seed=1, scale=0.2)
    row = randn(70, dtype=dtype, seed=2) if bias else None
    expected = dense_reference.dense(x, weight, row, name)
    assert error(dense.dense(x, weight, row, name), expected) < 2 * tolerance(dtype)


@pytest.mark.parametrize("shape", [(37, 96, 64), (5, 64, 40), (16, 32, 16)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("halves", [True, False])
def test_fused_product(halves: bool, bias: bool, shape: tuple[int, int, int]) -> None:
    rows, columns, inner = shape
    tile = None if not halves else Shape(16, 32, 16, 4, 1, 4, 1)
    if triton_device.ON_GPU:
        rows, tile = rows * 100, Shape(128, 256, 64, halves=halves)
    x = randn(rows, inner, dtype=torch.float16, seed=0)
    weight = randn(columns, inner, dtype=torch.float16, seed=1, scale=0.2)
    row = randn(columns, dtype=torch.float16, seed=2) if bias else None
    for name in ("gelu", "silu", None):
        given = None if row is None else row.float()
        expected = dense_reference.dense(x.float(), weight.float(), given, name)
        assert error(fused_product(x, weight, row, name, shape=tile), expected) < tolerance(torch.float16)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_fused_product_of_eight_bits(dtype: torch.dtype) -> None:
    if dtype is torch.float8_e4m3fn and not triton_device.ON_GPU:
        pytest.skip("the interpreter multiplies no FP8")
    rows, columns, inner = 45, 96, 64
    x, weight = (
        (randn(n, inner, dtype=torch.float32, seed=n) * (30 if dtype is torch.int8 else 1)).to(dtype)
        for n in (rows, columns)
    )
    scales = (
        randn(rows, dtype=torch.float32, seed=3).abs() / 9,
        randn(columns, dtype=torch.float32, seed=4) / 9,
    )
    bias = randn(columns, dtype=torch.float32, seed=5)
    plain = [codes.float() * scale[:, None] for codes, scale in zip((x, weight), scales)]
    expected = dense_reference.dense(plain[0], plain[1], bias, "silu")
    ours = fused_product(x, weight, bias, "silu", scales=scales, out_dtype=torch.float32)
    assert error(ours, expected) < (1e-5 if dtype is torch.int8 else 1e-2)


def test_every_size_takes_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows, many, shapes that the fused kernel does not take: all are right."""
    monkeypatch.setattr(triton_product, "MIN_ROWS", 70)
    for rows, inner, columns in (
        (70, 32, 64),
        (70, 36, 64),
        (66, 32, 64),
        (70, 32, 40),
        (7, 32, 64),
        (1, 64, 48),
    ):
        x = randn(rows, inner, dtype=torch.float16, seed=0)
        weight = randn(columns, inner, dtype=torch.float16, seed=1, scale=0.2)
        row = randn(columns, dtype=torch.float16, seed=2)
        if not triton_device.ON_GPU or triton_product.supports_pdl(x.device):
            assert takes(x, weight) == ((rows, inner, columns) == (70, 32, 64))
        for bias in (row, None):
            for name in ("gelu", None):
                expected = dense_reference.dense(
                    x.float(), weight.float(), None if bias is None else bias.float(), name
                )
                assert error(dense.dense(x, weight, bias, name), expected) < 2 * tolerance(torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [2, 65, 576])
def test_layer_norm_of_a_sum(dim: int, dtype: torch.dtype) -> None:
    x, residual = randn(3, dim, dtype=dtype, seed=0, scale=3.0), randn(3, dim, dtype=dtype, seed=1)
    weight, bias = randn(dim, dtype=dtype, seed=2), randn(dim, dtype=dtype, seed=3)
    for b in (None, bias):
        ours = norms.layer_norm(x.clone(), weight, b, 1e-3, residual)
        assert error(ours, norm_reference.layer_norm(x, weight, b, 1e-3, residual)) < tolerance(dtype)
        normed, total = norms.add_layer_norm(x, residual.clone(), weight, b, 1e-3)
        expected, expected_total = norm_reference.add_layer_norm(x, residual, weight, b, 1e-3)
        assert error(normed, expected) < tolerance(dtype)
        assert torch.equal(total, expected_total)


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES[-1:]], ids=str)
@pytest.mark.parametrize("mode", ["sum", "mean", "max", "weighted_mean"])
def test_pooling(mode: str, dtype: torch.dtype) -> None:
    lens = [1, 40, 3, 16, 33]
    values = randn(sum(lens), 150, dtype=dtype, seed=4) - 2.0
    starts = batch_of(lens).query_starts
    expected = pooling_reference.segment_pool(values.cpu(), starts.cpu(), mode)
    assert error(pooling.segment_pool(values, starts, mode), expected) < 1e-5


CASES = [
    # lengths, heads, key heads, head size, causal, window, soft cap
    ([5, 1, 34, 16, 17], 4, 4, 64, False, None, None),
    ([33, 2, 48], 4, 2, 32, True, None, None),
    ([40, 7], 6, 2, 80, True, 9, None),
    ([50, 16, 1], 2, 2, 64, False, 6, None),
    ([21, 30], 7, 1, 16, True, None, 15.0),
    ([3] * 20, 2, 2, 8, False, None, None),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_packed_attention(case: tuple, dtype: torch.dtype) -> None:
    lens, heads, kv_heads, dim, causal, window, cap = case
    q, k, v = qkv_of(lens, heads, kv_heads, dim, dtype)
    batch = batch_of(lens, causal)
    options = {"scale": dim**-0.5, "window": window, "soft_cap": cap}
    expected = attention_reference.attention(q, k, v, batch, 0, **options)
    for _ in range(2):  # the second layer finds the map of the first
        assert error(packed_attention(q, k, v, batch, **options), expected) < tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reach", [60, 7])
def test_biased_attention(reach: int, dtype: torch.dtype) -> None:
    lens, heads, dim = [1, 44, 16, 19], 3, 32
    q, k, v = qkv_of(lens, heads, heads, dim, dtype)
    bias = randn(heads, 2 * reach + 1, dtype=torch.float32, seed=9)
    batch = batch_of(lens)
    expected = biased_reference.biased_attention(q, k, v, bias, batch, scale=0.2)
    assert error(packed_attention(q, k, v, batch, scale=0.2, bias=bias), expected) < tolerance(dtype)


def test_a_sequence_ignores_its_neighbours() -> None:
    """Bitwise, also beside empty sequences and NaN."""
    lens = [17, 0, 30, 0, 4]
    q, k, v = (x.clone() for x in qkv_of(lens, 2, 2, 32, DTYPES[0]))
    together = packed_attention(q, k, v, batch_of(lens), scale=0.3)
    alone = packed_attention(q[17:47], k[17:47], v[17:47], batch_of([30]), scale=0.3)
    assert torch.equal(alone, together[17:47])
    for x in (q, k, v):
        x[:17] = torch.nan
    assert torch.equal(packed_attention(q, k, v, batch_of(lens), scale=0.3)[17:], together[17:])


@pytest.mark.gpu
@pytest.mark.skipif(
    not supports_gluon(torch.device(DEVICE)),
    reason="needs a Hopper GPU, and the Triton that Gluon is used in",
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(16, 16, 64), (8, 2, 128), (3, 1, 64), (5, 5, 128)])
def test_packed_attention_specialized_by_warps(heads: int, kv_heads: int, dim: int, causal: bool) -> None:
    """Texts that end before, at and behind a tile; empty ones; a neighbour that is not finite; many turns a program."""
    from headrace.kernels.attention import triton_packed
    from headrace.kernels.attention.gluon_packed import ROWS, packed_specialized

    lens = [700, 1, 128, 129, 0, 64, 1300, 200, 512, 512, 255, 0, 33, *([512] * 24), 0, 0]
    for dtype in (torch.float16, torch.bfloat16):
        q, k, v = qkv_of(lens, heads, kv_heads, dim, dtype)
        batch = batch_of(lens, causal)
        starts = batch.query_starts.tolist()
        expected = attention_reference.attention(q, k, v, batch, 0, scale=0.09)
        for x in (q, k, v):
            x[starts[7] : starts[8]] = torch.inf
        assert triton_packed._specializes(q, k, v, len(lens))
        for _ in range(3):
            tiles = triton_packed._tiles(batch, q.shape[0], 1, ROWS)
            out = packed_specialized(q, k, v, tiles, scale=0.09, causal=causal)
            for i in range(len(lens)):
                if i != 7 and lens[i]:
                    here = slice(starts[i], starts[i + 1])
                    assert error(out[here], expected[here]) < tolerance(dtype), (i, lens[i], dtype)
