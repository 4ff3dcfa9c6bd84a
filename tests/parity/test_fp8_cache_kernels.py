"""The FP8 cache: attention that reads and writes it against the reference."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from test_triton_attention import make_batch

from headrace.kernels.attention import reference, triton_decode
from headrace.kernels.attention.cache import as_cached
from headrace.kernels.attention.decode_shapes import DecodeShape
from headrace.kernels.attention.triton import attention
from headrace.kernels.attention.triton_decode import DecodeWorkspace, QKNormRope, decode_attention
from headrace.kernels.attention.triton_words import round_fp8
from headrace.kernels.rotary.reference import qk_norm_rope
from headrace.layers.packed import AttentionBatch, LayerCache
from triton_device import DEVICE, DTYPES, ON_GPU, error, randn, tolerance

FP8 = torch.float8_e4m3fn


def make(*args):
    """q, k, v and a batch over an FP8 cache; what was NaN is NaN.

    New keys are FP8 numbers but on a GPU: the interpreter halves those that round up to a power of two.
    """
    (q, k, v), batch = make_batch(*args)
    old = batch.caches[0]
    batch.caches = [LayerCache(as_cached(old.k, FP8), as_cached(old.v, FP8))]
    if not ON_GPU:
        k, v = (as_cached(x, FP8).to(x.dtype) for x in (k, v))
    return (q, k, v), batch


CASES = [
    ([1, 1, 1], [1, 37, 130], 4, 2, 64, None, None),
    ([1, 1], [9, 40], 4, 2, 16, None, None),
    ([1, 1], [70, 33], 6, 2, 80, 24, None),
    ([1], [300], 2, 1, 128, None, 20.0),
    ([7, 1, 20], [7, 9, 50], 4, 2, 64, None, None),
    ([5, 18], [40, 18], 2, 1, 128, 6, 15.0),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case, dtype: torch.dtype) -> None:
    query_lens, seq_lens, heads, kv_heads, dim, window, cap = case
    (q, k, v), batch = make(query_lens, seq_lens, heads, kv_heads, dim, dtype)
    options = {"scale": 1 / math.sqrt(dim), "window": window, "soft_cap": cap}
    expected = reference.attention(q, k, v, batch, 0, **options)
    caches = (batch.caches[0].k, batch.caches[0].v)
    written = [cache.view(torch.uint8).clone() for cache in caches]
    for cache in caches:
        cache.view(torch.uint8).view(-1, kv_heads, dim)[batch.slots] = 127
    out = attention(q, k, v, batch, 0, **options)
    assert error(out, expected) < 2 * tolerance(dtype)
    for cache, wanted in zip(caches, written):
        assert torch.equal(cache.view(torch.uint8), wanted)


@pytest.mark.parametrize("dim", [64, 96])
def test_fused_step(dim: int) -> None:
    """The new key and value are rounded and written inside the decode kernel; an ill key of the past is seen."""
    dtype, heads, kv_heads, lens = DTYPES[0], 4, 2, [1, 140, 65]
    (q, k, v), batch = make([1, 1, 1], lens, heads, kv_heads, dim, dtype)
    expected = reference.attention(q, k, v, batch, 0, scale=0.1)
    cache = batch.caches[0]
    wanted = [pool.view(torch.uint8).clone() for pool in (cache.k, cache.v)]
    for pool in (cache.k, cache.v):
        pool.view(torch.uint8).view(-1, kv_heads, dim)[batch.slots] = 127

    def step() -> torch.Tensor:
        return decode_attention(
            q, cache.k, cache.v, batch.block_tables, batch.seq_lens,
            DecodeWorkspace.allocate(3, heads, kv_heads, dim, DEVICE), scale=0.1, new_k=k, new_v=v,
            fused=QKNormRope(None, 0.0, None, None),
        )  # fmt: skip

    assert error(step(), expected) < 2 * tolerance(dtype)
    for pool, want in zip((cache.k, cache.v), wanted):
        assert torch.equal(pool.view(torch.uint8), want)
    if not ON_GPU:  # the interpreter reads NaN as 480
        return
    block = batch.block_tables[1, 2]
    cache.k.view(torch.uint8)[block, 1, 0, 5] = 127
    out = step()
    assert out[1, : heads // 2].isnan().all()
    assert out[1, heads // 2 :].isfinite().all() and out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_step_with_norm_and_rotation(dtype: torch.dtype, long: bool) -> None:
    """As engines run it: heads of 128, and on a GPU sequences of many pieces in both cuts."""
    heads, kv_heads, dim = 4, 2, 128
    lens = [1, 9003, 65, 700] if ON_GPU else [1, 140, 65]
    (q, k, v), batch = make([1] * len(lens), lens, heads, kv_heads, dim, dtype)
    weight = (1 + randn(2, dim, dtype=dtype, seed=3) / 4)[[0] * heads + [1] * kv_heads]
    angle = torch.arange(max(lens))[:, None] * 1e4 ** -(torch.arange(dim // 2) / (dim // 2))
    cos = torch.cat([angle.cos()] * 2, 1).to(DEVICE)
    sin = torch.cat([-angle.sin(), angle.sin()], 1).to(DEVICE)
    positions = batch.seq_lens.long() - 1
    qk = qk_norm_rope(torch.cat([q, k], 1), weight, 1e-6, cos[positions][:, None], sin[positions][:, None])
    expected = reference.attention(qk[:, :heads], qk[:, heads:], v, batch, 0, scale=0.1)
    cache = batch.caches[0]
    for pool in (cache.k, cache.v):
        pool.view(torch.uint8).view(-1, kv_heads, dim)[batch.slots] = 127
    out = decode_attention(
        q, cache.k, cache.v, batch.block_tables, batch.seq_lens,
        DecodeWorkspace.allocate(len(lens), heads, kv_heads, dim, DEVICE), scale=0.1, new_k=k, new_v=v,
        fused=QKNormRope(weight, 1e-6, cos, sin), long=long,
    )  # fmt: skip
    # The interpreter rounds the new key otherwise, see make.
    assert error(out, expected) < (2 * tolerance(dtype) if ON_GPU else 0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prompts_with_heads_of_128(dtype: torch.dtype) -> None:
    """Two short prompts, and a long one whose beginning is in the cache, in tiles of either size."""
    for query_lens, seq_lens in (([23, 27], [23, 27]), ([808], [9000]) if ON_GPU else ([40], [90])):
        (q, k, v), batch = make(query_lens, seq_lens, 4, 2, 128, dtype)
        expected = reference.attention(q, k, v, batch, 0, scale=0.09)
        assert error(attention(q, k, v, batch, 0, scale=0.09), expected) < 2 * tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e-4, 1.0, 3e4])
def test_pieces_of_many_tiles(size: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles behind the first of a piece are read without masks; queries may be beyond what float16 holds.

    What was never written is NaN: a read too far would show.
    """
    if not ON_GPU:  # there pieces are as short as tiles otherwise
        monkeypatch.setattr(triton_decode, "_shape", lambda *_: DecodeShape(16, 64, 2, 4, 1))
    lens = [5000, 1, 1023, 64] if ON_GPU else [70, 1]
    for dim in (64, 128) if ON_GPU else (64,):
        (q, k, v), batch = make([1] * len(lens), lens, 8, 2, dim, dtype)
        cache = batch.caches[0]
        for pool in (cache.k, cache.v):  # numbers of every size, up to the largest
            numbers = pool.float() * 2.0 ** torch.arange(-6, 10, device=DEVICE).repeat(dim // 16)
            pool.copy_(as_cached(numbers, FP8))
        k, v = k * 100, v * 100
        q = (q.float() * size).clamp(-6e4, 6e4).to(dtype)
        scale = 0.01 / size
        k, v = (as_cached(x, FP8).to(dtype) for x in (k, v))
        expected = reference.attention(q, k, v, batch, 0, scale=scale)
        for long in (False, True):
            out = decode_attention(
                q, cache.k, cache.v, batch.block_tables, batch.seq_lens,
                DecodeWorkspace.allocate(len(lens), 8, 2, dim, DEVICE), scale=scale, long=long,
            )  # fmt: skip
            assert error(out, expected) < 2 * tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fixed", [False, True])
def test_chunks_change_nothing(fixed: bool, dtype: torch.dtype) -> None:
    """A prompt sees its keys and values as the cache has them, in one piece and behind a piece of itself."""
    (q, k, v), whole = make_batch([50], [50], 4, 2, 64, dtype)
    cache = LayerCache(*(torch.empty_like(c, dtype=FP8) for c in (whole.caches[0].k, whole.caches[0].v)))
    slots, outs = whole.slots, []
    for chunks in ([50], [29, 21], [49, 1]):
        for pool in (cache.k, cache.v):
            pool.view(torch.uint8).fill_(127)
        done, found = 0, []
        for count in chunks:
            here = slice(done, done + count)
            done += count
            batch = AttentionBatch(
                query_starts=torch.tensor([0, count], dtype=torch.int32, device=DEVICE),
                seq_lens=torch.tensor([done], dtype=torch.int32, device=DEVICE), block_tables=whole.block_tables,
                slots=slots[here], caches=[cache], max_query_len=count, max_seq_len=done, fresh=done == count,
                fixed=fixed,
            )  # fmt: skip
            found.append(attention(q[here], k[here], v[here], batch, 0, scale=0.125))
        outs.append(torch.cat(found))
    plain = reference.attention(q, k, v, whole, 0, scale=0.125)  # over a cache of the model's type
    rounding = error(outs[0], plain)
    assert rounding > 0.01
    for out in outs[1:]:
        assert error(out, outs[0]) < rounding / 5


@triton.jit
def _round(x_ptr, value_ptr, code_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    value = round_fp8(tl.load(x_ptr + at))
    tl.store(value_ptr + at, value)
    tl.store(code_ptr + at, value.to(tl.float8e4nv).to(tl.uint8, bitcast=True))


def test_rounding() -> None:
    """Every number of E4M3, what lies half-way between two, numbers of every size, and what is beyond."""
    exact = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    half = (exact[1:] + exact[:-1]) / 2
    sizes = torch.randn(3000, generator=torch.Generator().manual_seed(1)) * 2.0 ** torch.linspace(
        -13, 12, 3000
    )
    x = torch.cat(
        [exact, half, half * (1 + 2**-20), half * (1 - 2**-20), sizes, torch.tensor([1e30, torch.inf])]
    )
    x = torch.nn.functional.pad(torch.cat([x, -x, torch.tensor([torch.nan])]), (0, 8192 - 2 * len(x) - 1)).to(
        DEVICE
    )
    value, code = torch.empty_like(x), torch.empty(8192, dtype=torch.uint8, device=DEVICE)
    _round[(1,)](x, value, code, N=8192)
    wanted = as_cached(x, FP8)
    assert torch.equal(value.nan_to_num(9e9), wanted.float().nan_to_num(9e9))
    seen = ~x.isnan()  # of which the interpreter makes 448
    assert torch.equal(code[seen], wanted.view(torch.uint8)[seen])
    assert not ON_GPU or code[~seen].item() & 127 == 127
