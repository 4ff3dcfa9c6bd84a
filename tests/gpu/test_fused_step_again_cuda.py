"""The fused decode step, again and again over one poisoned cache: the same bits, and nothing else of the cache touched.

In every cut of decode_shapes.py, over every type of cache: what lanes hand each other within a warp, and what is loaded
before the kernel before has ended, goes wrong from time to time or not at all.
"""

from __future__ import annotations

import pytest
import torch

from headrace.kernels.attention import fp4
from headrace.kernels.attention.cache import as_cached
from headrace.kernels.attention.fp4 import FP4
from headrace.kernels.attention.triton_decode import DecodeWorkspace, QKNormRope, decode_attention
from headrace.kernels.rotary.reference import qk_norm_rope

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HEADS, KV, DIM, BLOCK, SCALE = 32, 8, 128, 16, 0.088
CUTS = [
    (1, 100, False),
    (1, 2000, True),
    (4, 600, True),
    (16, 1000, False),
    (16, 1000, True),
    (64, 1500, False),
]


def wide(raw: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """Numbers of bytes of a cache."""
    return fp4.decode(raw) if kind is FP4 else raw.view(kind).float()


def rounded(x: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    return wide(as_cached(x.contiguous(), kind).view(torch.uint8), kind)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float8_e4m3fn, FP4], ids=str)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_same_bits(cut: tuple[int, int, bool], kind: torch.dtype) -> None:
    count, length, long = cut
    torch.manual_seed(length)
    with torch.device("cuda"):
        per = -(-length // BLOCK)
        tables = (torch.randperm(count * per).int() + 1).view(count, per)
        known = torch.randn(2, count * per + 1, BLOCK, KV, DIM, dtype=torch.bfloat16)
        cache = torch.stack([as_cached(part, kind).view(torch.uint8) for part in known])
        newest = tables[:, (length - 1) // BLOCK].long()
        cache[:, 0] = 255  # the null block and what was never written: NaN in every type
        cache[:, newest, (length - 1) % BLOCK] = 255
        if length % BLOCK:
            cache[:, newest, length % BLOCK :] = 255
        pools = cache.view(kind)
        lens = torch.full((count,), length, dtype=torch.int32)
        qkv = torch.randn(count, HEADS + 2 * KV, DIM, dtype=torch.bfloat16)
        gain = (1 + torch.randn(2, DIM) / 4).bfloat16()[[0] * HEADS + [1] * KV]
        angle = torch.rand(length, DIM // 2) * 6
        cos, sin = torch.cat([angle.cos()] * 2, 1), torch.cat([-angle.sin(), angle.sin()], 1)
        workspace = DecodeWorkspace.allocate(count, HEADS, KV, DIM, qkv.device)
        workspace.partial.fill_(torch.nan)
    qk = qk_norm_rope(qkv[:, : HEADS + KV], gain, 1e-6, cos[length - 1], sin[length - 1])
    new_k, new_v = qk[:, HEADS:], qkv[:, HEADS + KV :]
    keys, values = (
        torch.cat(
            [wide(raw[tables.long()], kind).flatten(1, 2)[:, : length - 1], rounded(new, kind)[:, None]], 1
        )
        for raw, new in zip(cache, (new_k, new_v))
    )
    score = torch.einsum("shgd,snhd->shgn", qk[:, :HEADS].float().view(count, KV, -1, DIM), keys) * SCALE
    wanted = torch.einsum("shgn,snhd->shgd", score.softmax(-1), values).reshape(count, HEADS, DIM)
    out = torch.empty_like(qkv[:, :HEADS])
    first, written = None, None
    for _ in range(10):
        decode_attention(
            qkv[:, :HEADS], pools[0], pools[1], tables, lens, workspace, scale=SCALE, long=long, out=out,
            new_k=qkv[:, HEADS : HEADS + KV], new_v=new_v, fused=QKNormRope(gain, 1e-6, cos, sin),
        )  # fmt: skip
        first = out.clone() if first is None else first
        written = cache.clone() if written is None else written
        assert torch.equal(out, first) and torch.equal(cache, written)
        out.fill_(7.0)
    assert (first.float() - wanted).norm() < 1e-2 * wanted.norm()
