"""An FP8 cache on the CPU: saturating writes, and the fast attention equal to the reference's."""

from __future__ import annotations

import math

import pytest
import torch

from headrace.kernels.attention import cpu, reference
from headrace.kernels.attention.cache import as_cached
from headrace.layers.packed import AttentionBatch, LayerCache

FP8 = torch.float8_e4m3fn


def test_writes_saturate() -> None:
    x = torch.tensor([1e6, -500.0, 0.0, math.nan, 3.3])
    got = as_cached(x, FP8).float()
    assert got[:3].tolist() == [448.0, -448.0, 0.0]
    assert torch.isnan(got[3])
    assert got[4].item() == 3.25
    assert as_cached(x, torch.float32) is x


@pytest.mark.parametrize("takes", [[1, 1, 1], [5, 1, 9], [3, 3, 3]])
@pytest.mark.parametrize("blocks", [[[3, 5], [1, 4, 7], [2]], [[1, 2], [3, 4, 5], [6]]])
def test_fast_equals_reference(takes: list[int], blocks: list[list[int]]) -> None:
    generator = torch.Generator().manual_seed(0)
    lens = [7, 12, 4]
    takes = [min(take, length) for take, length in zip(takes, lens)]

    def fresh() -> AttentionBatch:
        g = torch.Generator().manual_seed(5)
        cache = LayerCache(*(torch.randn(9, 4, 2, 8, generator=g).to(FP8) for _ in "kv"))
        slots = [
            table[p // 4] * 4 + p % 4 for table, n, t in zip(blocks, lens, takes) for p in range(n - t, n)
        ]
        return AttentionBatch(
            query_starts=torch.tensor([0, *takes]).cumsum(0).int(),
            seq_lens=torch.tensor(lens, dtype=torch.int32),
            block_tables=torch.tensor([b + [0] * (3 - len(b)) for b in blocks], dtype=torch.int32),
            slots=torch.tensor(slots),
            caches=[cache],
            max_query_len=max(takes),
            max_seq_len=max(lens),
            host_query_lens=takes,
            host_seq_lens=lens,
            host_blocks=blocks,
        )

    q, k, v = (torch.randn(sum(takes), h, 8, generator=generator) for h in (4, 2, 2))
    # New keys are read as they were stored, whether a sequence began in this step or not.
    got = cpu.attention(q, k, v, fresh(), 0, scale=0.3)
    want = reference.attention(q, k, v, fresh(), 0, scale=0.3)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
