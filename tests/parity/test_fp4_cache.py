"""The FP4 cache: its rows against the definition, and attention that reads and writes it against the reference."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from test_triton_attention import make_batch

from headrace.kernels.attention import fp4, reference
from headrace.kernels.attention.cache import readable
from headrace.kernels.attention.triton import attention
from headrace.kernels.attention.triton_decode import DecodeWorkspace, QKNormRope, decode_attention
from headrace.kernels.attention.triton_words import widen_fp4
from headrace.kernels.launch import INTERPRETED
from headrace.kernels.quantized_linear.formats import E2M1_VALUES, pack_nibbles
from headrace.layers.packed import AttentionBatch, LayerCache
from triton_device import DEVICE, DTYPES, error, randn, tolerance


def test_every_scale_and_code() -> None:
    codes = pack_nibbles(torch.arange(16, dtype=torch.uint8)).expand(256, 8)
    scales = torch.arange(256, dtype=torch.uint8)[:, None]
    values = fp4.decode(torch.cat((codes, scales), 1))
    want = torch.tensor(
        [[v * 2.0 ** (s // 8 - 24) * (1 + s % 8 / 8) for v in E2M1_VALUES] for s in range(255)]
    )
    assert torch.equal(values[:255], want)
    assert values[255].isnan().all()


def test_rounding_is_near_and_stable() -> None:
    x = randn(50, 96, dtype=torch.float32, seed=1).cpu() * torch.logspace(-5, 2, 50)[:, None]
    once = fp4.decode(fp4.encode(x))
    peak = x.unflatten(1, (-1, 16)).abs().amax(-1).repeat_interleave(16, 1)
    # Half the widest step (from 4 to 6), beside a scale that is rounded to 4 bits.
    assert ((once - x).abs() <= peak * (1 / 6 + 0.08)).all()
    assert error(once, x) < 0.13
    assert error(fp4.decode(fp4.encode(once)), once) < 0.1
    assert fp4.decode(fp4.encode(torch.full((1, 16), 1e6))).max() == 224 * 6  # saturates
    assert (fp4.decode(fp4.encode(torch.zeros(1, 16))) == 0).all()
    broken = torch.zeros(1, 32)
    broken[0, 3] = torch.inf
    assert fp4.decode(fp4.encode(broken))[0].isnan().tolist() == [True] * 16 + [False] * 16


@triton.jit
def _widen(words_ptr, scales_ptr, out_ptr, PLAIN: tl.constexpr):
    row = tl.arange(0, 256)[:, None]
    at = row * 8 + tl.arange(0, 8)[None, :]
    scales = tl.load(scales_ptr + row)
    parts = widen_fp4(tl.load(words_ptr + at), scales, 256, 8, tl.float32, PLAIN, False)
    for i in tl.static_range(4):
        tl.store(out_ptr + at * 4 + i, parts[i])


def test_words_of_every_scale_and_code() -> None:
    """As attention reads them, against the definition."""
    codes = torch.randint(0, 256, (256, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    scales = torch.stack((torch.arange(256), 255 - torch.arange(256)), 1).to(torch.uint8)
    codes[:, :8] = pack_nibbles(torch.arange(16, dtype=torch.uint8))
    out = torch.full((256, 32), 7.0, device=DEVICE)
    words = (x.view(torch.int16).to(DEVICE) for x in (codes, scales))
    _widen[(1,)](*words, out, PLAIN=INTERPRETED)
    wanted = fp4.decode(torch.cat((codes, scales), 1))
    factor = 1.0 if INTERPRETED else 65536.0
    assert torch.equal((out.cpu() * factor).nan_to_num(9e9), wanted.nan_to_num(9e9))


def rounded(batch: AttentionBatch) -> AttentionBatch:
    """The same batch over an FP4 cache; what was NaN is NaN."""
    old = batch.caches[0]
    batch.caches = [LayerCache(*(fp4.encode(pool).view(fp4.FP4) for pool in (old.k, old.v)))]
    return batch


CASES = [
    ([1, 1, 1], [1, 37, 130], 4, 2, 64, None, None),
    ([1, 1], [70, 33], 6, 2, 80, 24, None),
    ([7, 1, 20], [7, 9, 50], 4, 2, 64, None, None),
    ([5, 18], [40, 18], 2, 1, 128, 6, 15.0),
    ([1, 1], [90, 35], 4, 2, 96, None, None),
    ([1], [130], 4, 1, 128, None, None),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case, dtype: torch.dtype) -> None:
    query_lens, seq_lens, heads, kv_heads, dim, window, cap = case
    (q, k, v), batch = make_batch(query_lens, seq_lens, heads, kv_heads, dim, dtype)
    rounded(batch)
    options = {"scale": 1 / math.sqrt(dim), "window": window, "soft_cap": cap}
    expected = reference.attention(q, k, v, batch, 0, **options)
    caches = (batch.caches[0].k, batch.caches[0].v)
    written = [readable(cache) for cache in caches]
    for cache in caches:
        cache.view(torch.uint8).view(-1, kv_heads, cache.shape[3])[batch.slots] = 255
    out = attention(q, k, v, batch, 0, **options)
    assert error(out, expected) < 2 * tolerance(dtype)
    for cache, wanted in zip(caches, written):
        same = readable(cache).nan_to_num(7.0) == wanted.nan_to_num(7.0)
        assert same.float().mean() > 0.9999  # division of the device may round a half-way point otherwise


def test_fused_step() -> None:
    """The new key and value are rounded and written inside the decode kernel."""
    dtype, heads, kv_heads, dim, lens = DTYPES[0], 4, 2, 64, [1, 140, 65]
    (q, k, v), batch = make_batch([1, 1, 1], lens, heads, kv_heads, dim, dtype)
    rounded(batch)
    expected = reference.attention(q, k, v, batch, 0, scale=0.1)
    cache = batch.caches[0]
    wanted = readable(cache.k).nan_to_num(7.0), readable(cache.v).nan_to_num(7.0)
    for pool in (cache.k, cache.v):
        pool.view(torch.uint8).view(-1, kv_heads, pool.shape[3])[batch.slots] = 255
    out = decode_attention(
        q, cache.k, cache.v, batch.block_tables, batch.seq_lens,
        DecodeWorkspace.allocate(3, heads, kv_heads, dim, DEVICE), scale=0.1, new_k=k, new_v=v,
        fused=QKNormRope(None, 1e-6, None, None),
    )  # fmt: skip
    assert error(out, expected) < 2 * tolerance(dtype)
    for pool, want in zip((cache.k, cache.v), wanted):
        assert (readable(pool).nan_to_num(7.0) == want).float().mean() > 0.9999
