"""Steps that mean nothing, taken before the first request: kernels load, graphs are captured, memory is taken.

All their blocks are the null block, so that they leave nothing behind.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence as Several

import torch

from headrace.execution.graphs import GraphRunner
from headrace.execution.rehearsal import rehearse
from headrace.execution.runner import Runner
from headrace.execution.sampler import Masks
from headrace.kernels.ahead import Progress
from headrace.kvcache.blocks import BlockPool
from headrace.kvcache.table import BlockTable
from headrace.scheduling.plan import Chunk, StepPlan
from headrace.scheduling.sequence import Sequence
from headrace.types import Request, SamplingParams

__all__ = ["GRAPH_SECONDS", "prepare_kernels", "warm_up"]

GRAPH_SECONDS = 0.3  # spent on graphs before the first request; others follow while there is none

_GREEDY = SamplingParams(temperature=0.0)
_DRAWN = SamplingParams(temperature=1.0, top_p=0.9, top_k=50, min_p=0.01)
_OTHER = (
    SamplingParams(temperature=1.0, top_p=0.999),
    SamplingParams(temperature=0.7, repetition_penalty=1.1, presence_penalty=0.1, logprobs=1),
)


def prepare_kernels(
    runner: Runner,
    work: str,
    *,
    step_tokens: int,
    max_num_seqs: int,
    max_model_len: int,
    progress: Progress | None = None,
) -> None:
    """Compile what this machine lacks of the kernels that any step can launch, several at once.

    Args:
        work: see headrace.kernels.ahead.Note.
    """

    def steps() -> None:
        _step(runner, _spread(step_tokens, min(step_tokens, max_model_len - 1), max_num_seqs), [_GREEDY])
        if isinstance(runner, GraphRunner):
            for key in runner.keys(step_tokens):
                runner.capture(key)
        # Triton tells apart numbers that are 1, that 16 divides, and others.
        for rows in sorted({1, min(2, max_num_seqs), min(16, max_num_seqs), max_num_seqs}):
            for sampling in (_GREEDY, _DRAWN, *_OTHER):
                _step(runner, [1] * rows, [sampling])
                _step(runner, [1] * rows, [sampling], masked=True)
                _step(runner, [9] * min(rows, step_tokens // 9), [sampling])

    aside = runner.rehearsing() if isinstance(runner, GraphRunner) else contextlib.nullcontext()
    rehearse(work, runner.device, steps, aside, progress)


def warm_up(runner: Runner, *, step_tokens: int, max_num_seqs: int, max_model_len: int) -> None:
    """The longest step, every kind of sampling, and graphs of the likeliest steps.

    Args:
        runner: before its first step.
    """
    longest = min(step_tokens, max_model_len - 1)
    prompts = _spread(step_tokens, longest, max_num_seqs)
    _step(runner, prompts, [_GREEDY])
    if isinstance(runner, GraphRunner):
        began = time.perf_counter()
        runner.foresee(step_tokens)
        while runner.prepare_next() and time.perf_counter() - began < GRAPH_SECONDS:
            pass
    for sampling in (_DRAWN, *_OTHER):
        _step(runner, [1] * max_num_seqs, [sampling])
    _step(runner, [1], [_GREEDY])
    if runner.device.type == "cuda":
        torch.cuda.synchronize(runner.device)


def _spread(total: int, longest: int, most: int) -> list[int]:
    """Lengths up to ``longest`` that add up to ``total``, in no more than ``most`` parts."""
    lengths = [longest] * min(total // longest, most)
    rest = total - sum(lengths)
    return [*lengths, rest] if 0 < rest < longest and len(lengths) < most else lengths


def _step(runner: Runner, counts: list[int], kinds: Several[SamplingParams], *, masked: bool = False) -> None:
    """One step of new sequences with so many tokens each; lone tokens stand for the next of a longer one.

    Args:
        masked: the first one's next token is constrained (to any).
    """
    pool = BlockPool(2)
    plan = StepPlan()
    for row, count in enumerate(counts):
        request = Request(
            id=f"warm-{row}", token_ids=tuple([0] * max(count, 2)), sampling=kinds[row % len(kinds)]
        )
        table = BlockTable(pool, runner.block_size, b"")
        table.blocks = [0] * -(-len(request.token_ids) // runner.block_size)
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
    runner.sample(step, masks).result()
