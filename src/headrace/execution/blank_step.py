"""Steps of sequences that nobody asked for."""

from __future__ import annotations

from collections.abc import Sequence as Several

import torch

from headrace.execution.runner import Runner
from headrace.execution.sampler import Masks
from headrace.kvcache.blocks import BlockPool
from headrace.kvcache.table import BlockTable
from headrace.scheduling.plan import Chunk, StepPlan
from headrace.scheduling.sequence import Sequence
from headrace.types import Request, SamplingParams

__all__ = ["blank_step", "is_finite"]


def is_finite(runner: Runner) -> bool:
    """Whether the model's logits of one token are numbers. Writes to block 1, before anybody owns it."""
    return blank_step(runner, [1], [SamplingParams(temperature=0.0)], shortest=1, block=1) != [-1]


def blank_step(
    runner: Runner,
    counts: list[int],
    kinds: Several[SamplingParams],
    *,
    masked: bool = False,
    shortest: int = 2,
    block: int = 0,
) -> list[int]:
    """Tokens of one step of new sequences with so many new tokens each.

    Args:
        masked: the first one's next token is constrained (to any).
        shortest: length of a sequence at least: a lone token stands for the next of a longer one.
        block: all their blocks. Padding rows leave anything in the null block.
    """
    pool = BlockPool(2)
    plan = StepPlan()
    for row, count in enumerate(counts):
        request = Request(
            id=f"warm-{row}", token_ids=tuple([0] * max(count, shortest)), sampling=kinds[row % len(kinds)]
        )
        table = BlockTable(pool, runner.block_size, b"")
        table.blocks = [block] * -(-len(request.token_ids) // runner.block_size)
        sequence = Sequence(request, table, arrival=row, limit=1 << 30, eos_ids=frozenset())
        sequence.row = row
        plan.admitted.append(sequence)
        start = len(request.token_ids) - count
        plan.chunks.append(Chunk(sequence, start, count, samples=True, from_device=False, row=row, epoch=0))
    plan.chunks.sort(key=lambda chunk: chunk.count > 1)
    plan.num_tokens = sum(counts)
    step = runner.run(runner.prepare(plan))
    masks = None
    if masked and step.logits is not None:
        words = -(-step.logits.shape[-1] // 32)
        masks = Masks(
            torch.zeros(1, dtype=torch.int32, device=runner.device),
            torch.full((1, words), -1, dtype=torch.int32, device=runner.device),
        )
    return runner.sample(step, masks).result().tokens
