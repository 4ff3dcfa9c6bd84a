"""Passes that mean nothing, taken before the first request: kernels are there, memory is taken."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from headrace.execution.encode_graphs import graph_sizes
from headrace.execution.encode_runner import EncodeRunner
from headrace.execution.rehearsal import rehearse
from headrace.kernels.ahead import Progress
from headrace.types import EncodeParams, Request

__all__ = ["largest", "prepare_kernels", "run_once"]


def run_once(runner: EncodeRunner, counts: Sequence[int], *, every: bool = False) -> None:
    """One pass over texts of so many tokens each.

    Args:
        every: for every task of the model, not the first one alone.
    """
    first, *also = runner.model.card.tasks
    params = EncodeParams(task=first, also=tuple(also) if every else ())
    runner.run([Request(id=str(i), token_ids=(0,) * n, encode=params) for i, n in enumerate(counts)])


def largest(runner: EncodeRunner, tokens: int) -> list[int]:
    """Lengths of the largest pass: as few texts as hold so many tokens."""
    length = runner.max_tokens
    return [length] * (tokens // length) + [tokens % length] * (tokens % length > 0)


def prepare_kernels(
    runner: EncodeRunner, work: str, tokens: int, max_seqs: int, progress: Progress | None = None
) -> None:
    """Compile what this machine lacks of the kernels that any pass can launch, several at once.

    Args:
        work: see headrace.kernels.ahead.Note.
        tokens, max_seqs: of the largest pass.
    """
    graphs = runner.graphs

    def steps() -> None:
        if graphs is not None:
            for size in graph_sizes():
                graphs.capture(size)
                graphs.forget()
        # Triton tells apart numbers that are 1, that 16 divides, and others; kernels differ by powers of two.
        for seqs in sorted({min(n, max_seqs) for n in (1, 2, 16, 17, 33, 65, 128, 129, 256, max_seqs)}):
            for length in sorted({min(n, runner.max_tokens) for n in (1, 7, 16, 64, 100, 300, 512, 1 << 20)}):
                if seqs * length <= tokens or seqs == 1:
                    run_once(runner, [length] * seqs, every=True)
                    if graphs is not None:
                        graphs.forget()
        run_once(runner, largest(runner, tokens), every=True)

    aside = contextlib.nullcontext() if graphs is None else graphs.rehearsing()
    rehearse(work, runner.device, steps, aside, progress)
