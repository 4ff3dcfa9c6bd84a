"""Triton attention against the reference, with poisoned caches and outputs."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from headrace.kernels.attention import reference, triton_decode
from headrace.kernels.attention.decode_shapes import DecodeShape
from headrace.kernels.attention.triton import attention
from headrace.kernels.attention.triton_decode import DecodeWorkspace, QKNormRope, decode_attention
from headrace.kernels.attention.triton_fresh import fresh_attention, fresh_covers
from headrace.kernels.launch import supports_gluon
from headrace.kernels.rotary.reference import qk_norm_rope, rope
from headrace.layers.packed import AttentionBatch, LayerCache
from triton_device import DEVICE, DTYPES, ON_GPU, error, randn, tolerance

BLOCK = 4 if not ON_GPU else 16


def make_batch(
    query_lens: list[int], seq_lens: list[int], heads: int, kv_heads: int, dim: int, dtype: torch.dtype
):
    """q, k, v of the new tokens, and a batch whose earlier keys lie in shuffled blocks; all else is NaN."""
    num = sum(-(-n // BLOCK) for n in seq_lens)
    order = torch.randperm(num, generator=torch.Generator().manual_seed(1)) + 1
    caches = [
        torch.full((num + 2, BLOCK, kv_heads, dim), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2)
    ]
    tables = torch.zeros(len(seq_lens), max(-(-n // BLOCK) for n in seq_lens), dtype=torch.int32)
    slots, at = [], 0
    for i, (new, length) in enumerate(zip(query_lens, seq_lens)):
        count = -(-length // BLOCK)
        tables[i, :count] = order[at : at + count].int()
        at += count
        where = tables[i, torch.arange(length) // BLOCK].long() * BLOCK + torch.arange(length) % BLOCK
        slots.append(where[length - new :])
        for j, cache in enumerate(caches):
            old = where[: length - new].to(DEVICE)
            cache.view(-1, kv_heads, dim)[old] = randn(len(old), kv_heads, dim, dtype=dtype, seed=10 * i + j)
    total = sum(query_lens)
    starts = torch.tensor([0, *torch.tensor(query_lens).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    batch = AttentionBatch(
        query_starts=starts,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE),
        block_tables=tables.to(DEVICE),
        slots=torch.cat(slots).to(DEVICE),
        caches=[LayerCache(*caches)],
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
        fresh=all(new in (1, length) for new, length in zip(query_lens, seq_lens)),
    )
    qkv = randn(total, heads + 2 * kv_heads, dim, dtype=dtype, seed=99)
    return qkv.split([heads, kv_heads, kv_heads], 1), batch


CASES = [
    # query lengths, sequence lengths, heads, key heads, head size, window, soft cap
    ([1, 1, 1], [1, 37, 130], 4, 2, 64, None, None),
    ([1, 1], [70, 33], 6, 2, 80, 24, None),
    ([1], [600], 2, 1, 128, None, 20.0),
    ([1, 1], [90, 5], 3, 3, 96, 200, None),
    ([7, 1, 20], [7, 9, 50], 4, 2, 64, None, None),
    ([33], [33], 8, 1, 64, None, 15.0),
    ([5, 18], [40, 18], 4, 4, 80, 6, None),
    ([40], [90], 2, 1, 256, 16, 30.0),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_paged(case, dtype: torch.dtype) -> None:
    query_lens, seq_lens, heads, kv_heads, dim, window, cap = case
    (q, k, v), batch = make_batch(query_lens, seq_lens, heads, kv_heads, dim, dtype)
    options = {"scale": 1 / math.sqrt(dim), "window": window, "soft_cap": cap}
    expected = reference.attention(q, k, v, batch, 0, **options)
    written = [cache.clone() for cache in (batch.caches[0].k, batch.caches[0].v)]
    for cache in (batch.caches[0].k, batch.caches[0].v):
        cache.view(-1, kv_heads, dim)[batch.slots] = torch.nan
    out = attention(q, k, v, batch, 0, **options)
    assert error(out, expected) < tolerance(dtype)
    for cache, wanted in zip((batch.caches[0].k, batch.caches[0].v), written):
        assert torch.equal(cache.nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 9])
def test_without_cache(causal: bool, window: int | None) -> None:
    dtype, lens = DTYPES[-1], [5, 1, 34]
    (q, k, v), batch = make_batch(lens, lens, 4, 2, 32, dtype)
    batch.caches, batch.causal = [], causal
    expected = reference.attention(q, k, v, batch, 0, scale=0.2, window=window)
    assert error(attention(q, k, v, batch, 0, scale=0.2, window=window), expected) < tolerance(dtype)


def test_a_row_ignores_its_neighbours_and_padding() -> None:
    """Bitwise: alone, among others, and with padding rows of length 0."""
    dtype = DTYPES[0]
    (q, k, v), batch = make_batch([1, 1, 1], [150, 300, 20], 4, 2, 64, dtype)
    together = attention(q, k, v, batch, 0, scale=0.1)
    lens = torch.tensor([300, 0, 0, 0], dtype=torch.int32, device=DEVICE)
    out = torch.full((4, 4, 64), torch.nan, dtype=dtype, device=DEVICE)
    cache = batch.caches[0]
    workspace = DecodeWorkspace.allocate(4, 4, 2, 64, DEVICE)
    tables = batch.block_tables[[1, 1, 1, 1]]
    decode_attention(q[[1, 0, 0, 0]], cache.k, cache.v, tables, lens, workspace, scale=0.1, out=out)
    assert torch.equal(out[0], together[1])
    assert out[1:].isnan().all()
    assert not workspace.arrivals.any()


@pytest.mark.parametrize(
    ("heads", "dim", "window", "cap"),
    [(4, 64, None, None), (2, 128, 21, None), (6, 64, None, 15.0), (8, 128, None, None)],
)
def test_whole_prompts(heads: int, dim: int, window: int | None, cap: float | None) -> None:
    """Keys of this batch alone, read by descriptors: ragged lengths, and a neighbour whose values are infinite."""
    dtype, lens = torch.float16, [33, 1, 150, 16, 3] if ON_GPU else [21, 1, 34, 16, 3]
    (q, k, v), batch = make_batch(
        lens, [33, 9, 150, 16, 3] if ON_GPU else [21, 9, 34, 16, 3], heads, 2, dim, dtype
    )
    assert batch.fresh and fresh_covers(q, k, v)
    starts = batch.query_starts.tolist()
    options = {"scale": 1 / math.sqrt(dim), "window": window, "soft_cap": cap}
    expected = reference.attention(q, k, v, batch, 0, **options)
    v[starts[4] :] = torch.inf  # the last sequence is ill; the one before it must not notice
    out = torch.full_like(expected, torch.nan)
    fresh_attention(q, k, v, batch.query_starts, batch.seq_lens, skip_single=True, out=out, **options)
    for i, (start, end) in enumerate(pairwise(starts)):
        if i == 1:
            assert out[start:end].isnan().all()  # left to decode attention
        elif i < 4:
            assert error(out[start:end], expected[start:end]) < tolerance(dtype)


@pytest.mark.gpu
@pytest.mark.skipif(
    not supports_gluon(torch.device(DEVICE)),
    reason="needs a Hopper GPU, and the Triton that Gluon is used in",
)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 128), (8, 2, 128), (3, 3, 64), (7, 1, 128)])
def test_whole_prompts_specialized_by_warps(heads: int, kv_heads: int, dim: int) -> None:
    """Tiles that end before, at and behind the end of a sequence; a neighbour whose values are infinite."""
    from headrace.kernels.attention.gluon_fresh import specialized_attention

    dtype, lens = DTYPES[-1], [700, 1, 128, 129, 64, 1300, 200]
    seq_lens = [700, 9, 128, 129, 64, 1300, 200]
    (q, k, v), batch = make_batch(lens, seq_lens, heads, kv_heads, dim, dtype)
    starts = batch.query_starts.tolist()
    expected = reference.attention(q, k, v, batch, 0, scale=0.09)
    v[starts[6] :] = torch.inf
    out = torch.full_like(expected, torch.nan)
    specialized_attention(q, k, v, batch.query_starts, batch.seq_lens, scale=0.09, skip_single=True, out=out)
    for i, (start, end) in enumerate(pairwise(starts)):
        if i == 1:
            assert out[start:end].isnan().all()
        elif i < 6:
            assert error(out[start:end], expected[start:end]) < tolerance(dtype), i


SHAPES = (
    [
        *((64, 64, 1, 4, 3), (64, 512, 2, 4, 4), (16, 1024, 8, 1, 4)),
        *((16, 64, 8, 1, 4), (16, 512, 8, 1, 4)),
    ]
    if ON_GPU
    else [(16, 32, 2, 4, 1), (32, 512, 1, 4, 1), (16, 32, 2, 1, 1)]
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", [None, 100])
def test_any_cut_of_the_keys(
    shape: tuple[int, ...], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every shape that decode_shape may choose, over pieces that are full, ragged, and of the new key alone."""
    monkeypatch.setattr(triton_decode, "_shape", lambda *_: DecodeShape(*shape))
    split = shape[1]
    lens = [split, split + 1, 2 * split + 17, 3, min(5 * split, 600)]
    for dtype in DTYPES[-1:]:
        (q, k, v), batch = make_batch([1] * len(lens), lens, 4, 2, 128, dtype)
        expected = reference.attention(q, k, v, batch, 0, scale=0.09, window=window)
        out = attention(q, k, v, batch, 0, scale=0.09, window=window)
        assert error(out, expected) < tolerance(dtype)


@pytest.mark.parametrize(("norm", "width"), [(True, 64), (True, 0), (False, 64), (False, 16)])
def test_fused_prologue(norm: bool, width: int) -> None:
    """Norm, rotation and cache write inside the decode kernel, through a row table."""
    dtype, heads, kv_heads, dim, lens = DTYPES[0], 4, 2, 64, [1, 140, 65]
    (q, k, v), batch = make_batch([1, 1, 1], lens, heads, kv_heads, dim, dtype)
    gains = randn(2, dim, dtype=dtype, seed=3)
    weight = gains[[0] * heads + [1] * kv_heads] if norm else None
    cos = sin = None
    if width:
        angle = torch.arange(200)[:, None] * torch.rand(
            width // 2, generator=torch.Generator().manual_seed(0)
        )
        cos = torch.cat([angle.cos()] * 2, 1).to(DEVICE)
        sin = torch.cat([-angle.sin(), angle.sin()], 1).to(DEVICE)
    positions = torch.tensor(lens, device=DEVICE) - 1
    qk = torch.cat([q, k], 1)
    at = (None, None) if cos is None else (cos[positions][:, None], sin[positions][:, None])
    if weight is not None:
        qk = qk_norm_rope(qk, weight, 1e-6, *at)
    elif width:
        qk = rope(qk, *at)
    expected = reference.attention(qk[:, :heads], qk[:, heads:], v, batch, 0, scale=0.1)
    cache = batch.caches[0]
    wanted = cache.k.view(-1, kv_heads, dim)[batch.slots].clone()
    cache.k.view(-1, kv_heads, dim)[batch.slots] = torch.nan
    rows = torch.tensor([2, 0, 1], dtype=torch.int32, device=DEVICE)
    tables = torch.empty_like(batch.block_tables)
    tables[rows.long()] = batch.block_tables
    out = decode_attention(
        q, cache.k, cache.v, tables, batch.seq_lens, DecodeWorkspace.allocate(3, heads, kv_heads, dim, DEVICE),
        scale=0.1, rows=rows, new_k=k, new_v=v, fused=QKNormRope(weight, 1e-6, cos, sin),
    )  # fmt: skip
    assert error(out, expected) < tolerance(dtype)
    assert error(cache.k.view(-1, kv_heads, dim)[batch.slots], wanted) < tolerance(dtype)
    assert torch.equal(cache.v.view(-1, kv_heads, dim)[batch.slots], v)


@pytest.mark.parametrize("window", [None, 11])
def test_fixed_order(window: int | None) -> None:
    """Bitwise: a prompt at once beside others, and alone in chunks."""
    dtype, length = DTYPES[0], 45
    (q, k, v), batch = make_batch([length, 3], [length, 20], 4, 2, 64, dtype)
    batch.fixed = True
    whole = attention(q, k, v, batch, 0, scale=0.1, window=window)[:length]
    # The interpreter's products are a BLAS's, whose order may depend on the place in the tile: keep it there.
    anywhere = ([0, 1, 2, 30, 31, 45],) if ON_GPU else ()
    for cuts in ([0, 16, 32, 45], [0, 8, 40, 45], *anywhere):
        rows = []
        for begin, end in pairwise(cuts):
            chunk = AttentionBatch(
                query_starts=torch.tensor([0, end - begin], dtype=torch.int32, device=DEVICE),
                seq_lens=torch.tensor([end], dtype=torch.int32, device=DEVICE),
                block_tables=batch.block_tables[:1],
                slots=batch.slots[begin:end],
                caches=batch.caches,
                max_query_len=end - begin,
                max_seq_len=end,
                fixed=True,
            )
            rows.append(
                attention(q[begin:end], k[begin:end], v[begin:end], chunk, 0, scale=0.1, window=window)
            )
        assert torch.equal(torch.cat(rows), whole)
