"""The packed batch: what every model forward takes, on CPU and GPU, generating or encoding.

Shapes use T tokens of this step (all sequences one after another, never padded), S sequences,
B blocks of the longest sequence, P positions whose logits are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["AttentionBatch", "LayerCache", "PackedBatch"]


@dataclass(slots=True, frozen=True)
class LayerCache:
    """Paged keys and values of one layer, each [num_blocks, block_size, num_kv_heads, head_dim]."""

    k: Tensor
    v: Tensor


@dataclass(slots=True)
class AttentionBatch:
    """Which token belongs to which sequence, and where its keys lie.

    Attributes:
        query_starts: int32 [S + 1], prefix sums of the new tokens of each sequence.
        seq_lens: int32 [S], keys of each sequence including this step's.
        block_tables: int32 [S, B], KV blocks of each sequence in order; None without a cache (encoders).
        slots: int64 [T], block * block_size + offset where each new key goes; None without a cache.
        caches: one LayerCache a layer; empty without a cache.
        causal: False for bidirectional encoders.
        max_query_len, max_seq_len: host integers, so that no kernel launch waits for the device.
        fixed: every row is summed in the same order, whatever the batch and the chunk (deterministic mode).
        fresh: no sequence of two or more new tokens has earlier keys.
        some_single: whether a sequence may have one new token beside others that have more.
        host_query_lens, host_seq_lens, host_blocks: the same facts as Python lists, for the CPU path.
            None while a CUDA graph is captured or replayed.
        plan: what a kernel worked out from the fields above in the first layer, for the other layers of
            this step. A batch whose contents change needs a fresh one (or None).
    """

    query_starts: Tensor
    seq_lens: Tensor
    block_tables: Tensor | None = None
    slots: Tensor | None = None
    caches: list[LayerCache] = field(default_factory=list)
    causal: bool = True
    max_query_len: int = 0
    max_seq_len: int = 0
    some_single: bool = True
    fresh: bool = False
    fixed: bool = False
    host_query_lens: list[int] | None = None
    host_seq_lens: list[int] | None = None
    host_blocks: list[list[int]] | None = None
    plan: dict[object, Any] | None = None

    @property
    def decode_only(self) -> bool:
        """One new token a sequence."""
        return self.max_query_len == 1


@dataclass(slots=True)
class PackedBatch:
    """One forward pass.

    Attributes:
        token_ids: int64 [T].
        positions: int64 [T], counted from 0 in each sequence.
        attention: see AttentionBatch.
        token_types: int64 [T] for encoders with segments, else None.
        rope_lens: int64 [T], the sequence length that length-dependent rotary embeddings (dynamic NTK,
            LongRoPE) scale for. One value for the whole life of a sequence's cache, so that chunking does
            not change results: its prompt length. None: each sequence's length in this batch.
    """

    token_ids: Tensor
    positions: Tensor
    attention: AttentionBatch
    token_types: Tensor | None = None
    rope_lens: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @staticmethod
    def for_encoding(
        token_ids: list[list[int]],
        *,
        device: torch.device | str = "cpu",
        causal: bool = False,
        token_types: list[list[int]] | None = None,
    ) -> PackedBatch:
        """A cache-less batch from token lists, every list one sequence (none may be empty)."""
        lens = [len(ids) for ids in token_ids]
        starts = torch.zeros(len(lens) + 1, dtype=torch.int32)
        torch.cumsum(torch.tensor(lens, dtype=torch.int32), 0, out=starts[1:])
        flat = torch.tensor([t for ids in token_ids for t in ids], dtype=torch.int64)
        types = None
        if token_types is not None:
            types = torch.tensor([t for ids in token_types for t in ids], dtype=torch.int64).to(device)
        attention = AttentionBatch(
            query_starts=starts.to(device),
            seq_lens=torch.tensor(lens, dtype=torch.int32, device=device),
            causal=causal,
            max_query_len=max(lens),
            max_seq_len=max(lens),
            host_query_lens=lens,
            host_seq_lens=list(lens),
        )
        positions = torch.cat([torch.arange(n, dtype=torch.int64) for n in lens])
        return PackedBatch(flat.to(device), positions.to(device), attention, types)
