"""Pools whose offsets do not fit 32 bits: the first and the last block, and those at the border."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from headrace.kernels.attention.cache import cache_width
from headrace.kernels.attention.fp4 import FP4
from headrace.kernels.attention.triton import attention
from headrace.layers.packed import AttentionBatch, LayerCache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
HEADS, KV_HEADS, DIM, BLOCK = 8, 2, 128, 16
OFFSETS = 2**31
# New tokens and keys of each sequence: lone ones, a whole prompt, a chunk behind earlier keys.
STEPS = {
    "decode": ([1, 1, 1], [1, 40, 700]),
    "mixed": ([1, 1, 70, 33], [90, 1, 70, 130]),
    "chunk": ([130], [400]),
}


def as_bytes(cache: Tensor) -> Tensor:
    return cache.view(torch.uint8)


def small_cache(num_blocks: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Keys or values of ordinary size."""
    generator = torch.Generator(CUDA).manual_seed(seed)
    if dtype is FP4:
        raw = torch.empty(num_blocks, BLOCK, KV_HEADS, width, dtype=torch.uint8, device=CUDA)
        return raw.random_(0, 200, generator=generator).view(dtype)
    numbers = torch.randn(num_blocks, BLOCK, KV_HEADS, width, device=CUDA, generator=generator)
    return numbers.to(dtype)


def run(qkv: Tensor, new: list[int], lens: list[int], caches: list[Tensor], tables: Tensor) -> Tensor:
    """Attention of the newest tokens of each sequence; they are written first."""
    ends = [torch.arange(length - count, length, device=CUDA) for count, length in zip(new, lens)]
    slots = [row[end // BLOCK].long() * BLOCK + end % BLOCK for row, end in zip(tables, ends)]
    batch = AttentionBatch(
        query_starts=torch.tensor([0, *accumulate(new)], dtype=torch.int32, device=CUDA),
        seq_lens=torch.tensor(lens, dtype=torch.int32, device=CUDA),
        block_tables=tables,
        slots=torch.cat(slots),
        caches=[LayerCache(*caches)],
        max_query_len=max(new),
        max_seq_len=max(lens),
        fresh=all(count in (1, length) for count, length in zip(new, lens)),
    )
    q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], 1)
    return attention(q, k, v, batch, 0, scale=DIM**-0.5)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("beyond", [False, True], ids=["below", "beyond"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, FP4], ids=["bf16", "fp8", "fp4"])
def test_a_large_pool_answers_as_a_small_one(dtype: torch.dtype, beyond: bool, step: str) -> None:
    new, lens = STEPS[step]
    width = cache_width(DIM, dtype)
    border = OFFSETS // (BLOCK * KV_HEADS * width)
    num_blocks = border + 1000 if beyond else border - 1
    kind = torch.uint8 if dtype is FP4 else dtype
    # Keys and values are the same memory, a block apart: only every other block is used.
    whole = torch.empty(num_blocks + 1, BLOCK, KV_HEADS, width, dtype=kind, device=CUDA).view(dtype)
    large = [whole[:-1], whole[1:]]
    counts = [-(-length // BLOCK) for length in lens]
    total = sum(counts)
    small = [small_cache(total, width, dtype, seed) for seed in range(2)]
    # Where they lie in the large pool: both ends, then around the border.
    last = num_blocks - 1
    near = [2 - last % 2, last, 4 - last % 2, last - 2]
    near += [
        block for block in range(border - 60, border + 60) if block < last - 2 and (last - block) % 2 == 0
    ]
    where = torch.tensor([*near, *range(6 - last % 2, 6 + 2 * total, 2)], device=CUDA)[:total]
    tables = torch.zeros(len(lens), max(counts), dtype=torch.int32, device=CUDA)
    for row, count, end in zip(tables, counts, accumulate(counts)):
        row[:count] = torch.arange(end - count, end)
    for mine, theirs in zip(large, small):
        as_bytes(mine)[where] = as_bytes(theirs)
    qkv = torch.randn(sum(new), HEADS + 2 * KV_HEADS, DIM, device=CUDA).to(torch.bfloat16)
    expected = run(qkv, new, lens, small, tables)
    assert expected.isfinite().all()
    assert torch.equal(run(qkv, new, lens, large, where[tables.long()].int()), expected)
    for mine, theirs in zip(large, small):
        assert torch.equal(as_bytes(mine)[where], as_bytes(theirs))
