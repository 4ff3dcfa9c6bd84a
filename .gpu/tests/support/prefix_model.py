"""A model without weights whose every answer depends on every cached key.

It keeps token ids as keys; a position's hidden state is a checksum of all tokens up to it, read back through the
block table. A wrong slot, a stale block, a missing chunk or a mixed-up row changes the answer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.engines.generate import GenerateCore
from headrace.execution.runner import Runner
from headrace.kvcache.blocks import BlockPool
from headrace.layers.packed import LayerCache, PackedBatch
from headrace.scheduling.scheduler import Scheduler

MODULUS = 65_521


def checksum(token_ids: list[int]) -> int:
    value = 1
    for token in token_ids:
        value = (value * 31 + token + 7) % MODULUS
    return value


class PrefixModel:
    """CausalModel over one LayerCache [N, block_size, 1, 1] of token ids."""

    def __init__(self, vocab_size: int = 97) -> None:
        self.vocab_size = vocab_size

    def __call__(self, batch: PackedBatch) -> Tensor:
        att = batch.attention
        assert att.slots is not None
        assert att.block_tables is not None
        keys = att.caches[0].k
        keys.view(-1)[att.slots] = batch.token_ids.to(keys.dtype)
        block_size = keys.shape[1]
        starts = att.query_starts.tolist()
        out = torch.zeros(batch.num_tokens, 1, dtype=torch.float64)
        for s, seq_len in enumerate(att.seq_lens.tolist()):
            num_blocks = -(-seq_len // block_size)
            tokens = keys[att.block_tables[s, :num_blocks].long()].reshape(-1)[:seq_len].long().tolist()
            count = starts[s + 1] - starts[s]
            assert batch.positions[starts[s] : starts[s + 1]].tolist() == list(
                range(seq_len - count, seq_len)
            )
            for i in range(count):
                out[starts[s] + i] = checksum(tokens[: seq_len - count + i + 1])
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        rows = [torch.Generator().manual_seed(int(h)) for h in hidden[:, 0]]
        return torch.stack([torch.randn(self.vocab_size, generator=g) * 2 for g in rows])

    def next_greedy(self, token_ids: list[int]) -> int:
        return int(self.logits(torch.tensor([[checksum(token_ids)]]))[0].argmax())


def make_core(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 32,
    max_model_len: int = 128,
    overlap: bool = False,
    prefix_caching: bool = True,
    eos_ids: tuple[int, ...] = (),
    vocab_size: int = 97,
) -> GenerateCore:
    caches = [LayerCache(torch.full((num_blocks, block_size, 1, 1), -1.0), torch.empty(0))]
    runner = Runner(
        PrefixModel(vocab_size),
        caches,
        device=torch.device("cpu"),
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
    )
    scheduler = Scheduler(
        BlockPool(num_blocks),
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        eos_ids=eos_ids,
        prefix_caching=prefix_caching,
    )
    return GenerateCore(runner, scheduler, overlap=overlap)
