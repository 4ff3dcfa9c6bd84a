"""Steps that mean nothing, taken before the first request: kernels load, graphs are captured, memory is taken.

All their blocks are the null block, so that they leave nothing behind (blank_step.py).
"""

from __future__ import annotations

import contextlib
import time

import torch

from headrace.execution.blank_step import blank_step
from headrace.execution.graphs import GraphRunner
from headrace.execution.rehearsal import rehearse
from headrace.execution.runner import Runner
from headrace.kernels.ahead import Progress
from headrace.types import SamplingParams

__all__ = ["GRAPH_SECONDS", "prepare_kernels", "warm_up"]

GRAPH_SECONDS = 0.2  # spent on graphs before the first request; others follow while there is none

_GREEDY = SamplingParams(temperature=0.0)
_DRAWN = SamplingParams(temperature=1.0, top_p=0.9, top_k=50, min_p=0.01)
_OTHER = (
    SamplingParams(temperature=1.0, top_p=0.999),
    SamplingParams(temperature=0.7, repetition_penalty=1.1, presence_penalty=0.1, logprobs=1),
)
_PROMPT_SCORED = SamplingParams(temperature=0.0, logprobs=0, prompt_logprobs=1)


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

    def step(counts: list[int], kind: SamplingParams, *, masked: bool = False) -> None:
        blank_step(runner, counts, [kind], masked=masked)
        if isinstance(runner, GraphRunner):
            runner.forget()

    def steps() -> None:
        step(_spread(step_tokens, min(step_tokens, max_model_len - 1), max_num_seqs), _GREEDY)
        if isinstance(runner, GraphRunner):
            for key in runner.ladders.all(step_tokens):
                runner.capture(key)
                runner.forget()
        # Triton tells apart numbers that are 1, that 16 divides, and others.
        for rows in sorted({1, min(2, max_num_seqs), min(16, max_num_seqs), max_num_seqs}):
            for sampling in (_GREEDY, _DRAWN, *_OTHER):
                step([1] * rows, sampling)
                step([1] * rows, sampling, masked=True)
                step([9] * min(rows, step_tokens // 9), sampling)
        for count in (2, 9, 17, 100):  # logits of this many prompt tokens less one
            step([min(count, step_tokens)], _PROMPT_SCORED)

    rehearse(work, runner.device, steps, _aside(runner), progress)


def warm_up(runner: Runner, *, step_tokens: int, max_num_seqs: int, max_model_len: int) -> None:
    """The longest step, every kind of sampling, and graphs of the likeliest steps.

    Args:
        runner: before its first step.
    """
    prompts = _spread(step_tokens, min(step_tokens, max_model_len - 1), max_num_seqs)
    with _aside(runner):  # the first layers alone take as much memory and load as many kernels as all
        blank_step(runner, prompts, [_GREEDY])
        for sampling in (_DRAWN, *_OTHER):
            blank_step(runner, [1] * max_num_seqs, [sampling])
    blank_step(runner, [2], [_GREEDY])
    blank_step(runner, [1], [_GREEDY])
    if isinstance(runner, GraphRunner):
        began = time.perf_counter()
        runner.foresee(step_tokens)
        while runner.prepare_next() and time.perf_counter() - began < GRAPH_SECONDS:
            pass
    if runner.device.type == "cuda":
        torch.cuda.synchronize(runner.device)


def _aside(runner: Runner) -> contextlib.AbstractContextManager[None]:
    """Without graphs, where there are any."""
    return runner.rehearsing() if isinstance(runner, GraphRunner) else contextlib.nullcontext()


def _spread(total: int, longest: int, most: int) -> list[int]:
    """Lengths up to ``longest`` that add up to ``total``, in no more than ``most`` parts."""
    lengths = [longest] * min(total // longest, most)
    rest = total - sum(lengths)
    return [*lengths, rest] if 0 < rest < longest and len(lengths) < most else lengths
