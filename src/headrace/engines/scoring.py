"""Logits of whole texts, computed as serving does: in pieces, through the paged cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from headrace.kvcache.pool import allocate_caches
from headrace.layers.packed import AttentionBatch, PackedBatch
from headrace.models.decoder import DecoderModel

__all__ = ["piecewise_logits"]

_BLOCK = 16


def piecewise_logits(
    model: DecoderModel, token_ids: list[int], cache_dtype: torch.dtype, device: torch.device, piece: int = 32
) -> Iterator[Tensor]:
    """float32 [up to ``piece``, V] for one piece of a text after another.

    Later pieces read the earlier ones' keys and values from the cache, as stored there.
    """
    blocks = -(-len(token_ids) // _BLOCK)
    layout = [(layer.num_kv_heads, layer.head_dim) for layer in model.kv_layout]
    caches = allocate_caches(layout, blocks + 1, _BLOCK, cache_dtype, device)
    table = list(range(1, blocks + 1))  # block 0 is the null block
    for start in range(0, len(token_ids), piece):
        ids = token_ids[start : start + piece]
        end = start + len(ids)
        positions = torch.arange(start, end, dtype=torch.int64)
        attention = AttentionBatch(
            query_starts=torch.tensor([0, len(ids)], dtype=torch.int32, device=device),
            seq_lens=torch.tensor([end], dtype=torch.int32, device=device),
            block_tables=torch.tensor([table], dtype=torch.int32, device=device),
            slots=(positions + _BLOCK).to(device),
            caches=caches,
            max_query_len=len(ids),
            max_seq_len=end,
            host_query_lens=[len(ids)],
            host_seq_lens=[end],
            host_blocks=[table[: -(-end // _BLOCK)]],
        )
        lengths = torch.full((len(ids),), len(token_ids), dtype=torch.int64, device=device)
        batch = PackedBatch(
            torch.tensor(ids, device=device), positions.to(device), attention, rope_lens=lengths
        )
        yield model.logits(model(batch))
