"""Attention sinks in Triton against the reference, and the reference against a key of value zero."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from test_fp4_cache import rounded
from test_fp8_cache_kernels import make as make_fp8
from test_triton_attention import CASES, SHAPES, make_batch

from headrace.kernels.attention import reference, triton_decode
from headrace.kernels.attention.decode_shapes import DecodeShape
from headrace.kernels.attention.triton import attention
from headrace.kernels.attention.triton_decode import DecodeWorkspace, QKNormRope, decode_attention
from headrace.kernels.attention.triton_fresh import fresh_attention, fresh_covers
from triton_device import DEVICE, DTYPES, ON_GPU, error, randn, tolerance

FEW = [CASES[0], CASES[1], CASES[4], CASES[6]]  # for the interpreter, which takes seconds a case


def sinks_of(heads: int, seed: int = 5) -> torch.Tensor:
    """Some that weigh as a key does, one as a hundred keys do, one that outweighs any number of them."""
    sinks = randn(heads, dtype=torch.float32, seed=seed) * 2
    sinks[-1] = 5.0
    sinks[0] = 60.0 if heads > 2 else sinks[0]
    return sinks


def test_reference_is_a_softmax_with_one_more_key() -> None:
    (q, k, v), batch = make_batch([5], [5], 3, 1, 8, torch.float32)
    batch.caches = []
    sinks = sinks_of(3)
    out = reference.attention(q, k, v, batch, 0, scale=0.3, sinks=sinks)
    for head in range(3):
        for row in range(5):
            weights = (k[: row + 1, 0] @ q[row, head] * 0.3).exp()
            total = weights.sum() + sinks[head].exp()
            want = (weights[:, None] * v[: row + 1, 0]).sum(0) / total
            torch.testing.assert_close(out[row, head], want)


@pytest.mark.parametrize("dtype", DTYPES if ON_GPU else DTYPES[-1:], ids=str)
@pytest.mark.parametrize("case", CASES if ON_GPU else FEW, ids=str)
def test_paged(case, dtype: torch.dtype) -> None:
    query_lens, seq_lens, heads, kv_heads, dim, window, cap = case
    (q, k, v), batch = make_batch(query_lens, seq_lens, heads, kv_heads, dim, dtype)
    options = {"scale": 1 / math.sqrt(dim), "window": window, "soft_cap": cap, "sinks": sinks_of(heads)}
    expected = reference.attention(q, k, v, batch, 0, **options)
    assert error(attention(q, k, v, batch, 0, **options), expected) < tolerance(dtype)
    plain = attention(q, k, v, batch, 0, **{**options, "sinks": None})
    assert error(plain, expected) > 3 * tolerance(dtype)
    batch.fixed, batch.plan = True, None
    assert error(attention(q, k, v, batch, 0, **options), expected) < tolerance(dtype)


@pytest.mark.parametrize("kind", ["fp8", "fp4"])
@pytest.mark.parametrize("case", FEW if ON_GPU else FEW[1:3], ids=str)
def test_smaller_caches(case, kind: str) -> None:
    query_lens, seq_lens, heads, kv_heads, dim, window, cap = case
    dtype = DTYPES[-1]
    make = make_fp8 if kind == "fp8" else make_batch
    (q, k, v), batch = make(query_lens, seq_lens, heads, kv_heads, dim, dtype)
    if kind == "fp4":
        rounded(batch)
    options = {"scale": 1 / math.sqrt(dim), "window": window, "soft_cap": cap, "sinks": sinks_of(heads)}
    expected = reference.attention(q, k, v, batch, 0, **options)
    assert error(attention(q, k, v, batch, 0, **options), expected) < 2 * tolerance(dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 9])
def test_without_cache(causal: bool, window: int | None) -> None:
    dtype, lens = DTYPES[-1], [5, 1, 34]
    (q, k, v), batch = make_batch(lens, lens, 6, 2, 32, dtype)
    batch.caches, batch.causal = [], causal
    options = {"scale": 0.2, "window": window, "sinks": sinks_of(6)}
    expected = reference.attention(q, k, v, batch, 0, **options)
    assert error(attention(q, k, v, batch, 0, **options), expected) < tolerance(dtype)


@pytest.mark.parametrize(("heads", "dim", "window"), [(4, 64, None), (2, 128, 21), (6, 64, 15)])
def test_whole_prompts(heads: int, dim: int, window: int | None) -> None:
    lens = [33, 16, 3, 50]
    (q, k, v), batch = make_batch(lens, lens, heads, 2, dim, torch.float16)
    assert fresh_covers(q, k, v)
    options = {"scale": 1 / math.sqrt(dim), "window": window, "sinks": sinks_of(heads)}
    expected = reference.attention(q, k, v, batch, 0, **options)
    out = fresh_attention(q, k, v, batch.query_starts, batch.seq_lens, **options)
    assert error(out, expected) < tolerance(torch.float16)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 128])
def test_long_prompts_of_large_heads(window: int | None) -> None:
    """Of a shape for which, without sinks, warps are specialized: that kernel must not be taken."""
    (q, k, v), batch = make_batch([2100, 1100], [2100, 1100], 8, 2, 128, torch.bfloat16)
    options = {"scale": 0.09, "window": window, "sinks": sinks_of(8)}
    expected = reference.attention(q, k, v, batch, 0, **options)
    assert error(attention(q, k, v, batch, 0, **options), expected) < tolerance(torch.bfloat16)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", [None, 100])
def test_any_cut_of_the_keys(
    shape: tuple[int, ...], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sink counts once, however many pieces there are; one piece, full and ragged ones, the new key alone."""
    monkeypatch.setattr(triton_decode, "_shape", lambda *_: DecodeShape(*shape))
    split, dtype = shape[1], DTYPES[-1]
    lens = [split, split + 1, 2 * split + 17, 3, min(5 * split, 600)]
    (q, k, v), batch = make_batch([1] * len(lens), lens, 6, 2, 64, dtype)
    options = {"scale": 0.09, "window": window, "sinks": sinks_of(6)}
    expected = reference.attention(q, k, v, batch, 0, **options)
    together = attention(q, k, v, batch, 0, **options)
    assert error(together, expected) < tolerance(dtype)
    if ON_GPU:
        assert torch.equal(attention(q, k, v, batch, 0, **options), together)
    out = torch.full_like(q[:2], torch.nan)
    lens_alone = torch.tensor([lens[2], 0], dtype=torch.int32, device=DEVICE)
    cache = batch.caches[0]
    decode_attention(
        q[[2, 0]], cache.k, cache.v, batch.block_tables[[2, 2]], lens_alone,
        DecodeWorkspace.allocate(2, 6, 2, 64, DEVICE), out=out, **options,
    )  # fmt: skip
    assert torch.equal(out[0], together[2])


def test_fused_step() -> None:
    """As the fast step runs it: the new key never leaves the kernel; short and cut sequences, and a first token."""
    dtype, heads, kv_heads, dim, lens = DTYPES[0], 6, 2, 64, [1, 140, 65]
    (q, k, v), batch = make_batch([1, 1, 1], lens, heads, kv_heads, dim, dtype)
    for window in (None, 40):
        options = {"scale": 0.1, "window": window, "sinks": sinks_of(heads)}
        expected = reference.attention(q, k, v, batch, 0, **options)
        cache = batch.caches[0]
        out = decode_attention(
            q, cache.k, cache.v, batch.block_tables, batch.seq_lens,
            DecodeWorkspace.allocate(3, heads, kv_heads, dim, DEVICE), new_k=k, new_v=v,
            fused=QKNormRope(None, 0.0, None, None), **options,
        )  # fmt: skip
        assert error(out, expected) < tolerance(dtype)


def test_fixed_order() -> None:
    """Bitwise: a prompt at once beside another, and alone in chunks."""
    dtype, length = DTYPES[0], 45
    (q, k, v), batch = make_batch([length, 3], [length, 20], 4, 2, 64, dtype)
    batch.fixed = True
    sinks = sinks_of(4)
    whole = attention(q, k, v, batch, 0, scale=0.1, sinks=sinks)[:length]
    rows = []
    for begin, end in pairwise([0, 16, 32, 45]):
        chunk = type(batch)(
            query_starts=torch.tensor([0, end - begin], dtype=torch.int32, device=DEVICE),
            seq_lens=torch.tensor([end], dtype=torch.int32, device=DEVICE),
            block_tables=batch.block_tables[:1],
            slots=batch.slots[begin:end],
            caches=batch.caches,
            max_query_len=end - begin,
            max_seq_len=end,
            fixed=True,
        )
        rows.append(attention(q[begin:end], k[begin:end], v[begin:end], chunk, 0, scale=0.1, sinks=sinks))
    assert torch.equal(torch.cat(rows), whole)
