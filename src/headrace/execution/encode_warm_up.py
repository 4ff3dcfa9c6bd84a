"""Passes that mean nothing, taken before the first request: kernels are there, memory is taken."""

from __future__ import annotations

import contextlib

from headrace.execution.encode_graphs import LARGE, TOKENS
from headrace.execution.encode_runner import EncodeRunner
from headrace.execution.rehearsal import rehearse
from headrace.kernels.ahead import Progress
from headrace.types import EncodeParams, Request

__all__ = ["prepare_kernels", "run_once"]


def run_once(runner: EncodeRunner, tokens: int, length: int | None = None, *, every: bool = False) -> None:
    """One pass over so many tokens, in texts of ``length`` (None: the longest there can be).

    Args:
        every: for every task of the model, not the first one alone.
    """
    length = min(tokens, length or runner.max_tokens)
    counts = [length] * (tokens // length) + [tokens % length] * (tokens % length > 0)
    first, *also = runner.model.card.tasks
    params = EncodeParams(task=first, also=tuple(also) if every else ())
    runner.run([Request(id=str(i), token_ids=(0,) * n, encode=params) for i, n in enumerate(counts)])


def prepare_kernels(runner: EncodeRunner, work: str, tokens: int, progress: Progress | None = None) -> None:
    """Compile what this machine lacks of the kernels that any pass can launch, several at once.

    Args:
        work: see headrace.kernels.ahead.Note.
        tokens: of the largest pass.
    """
    graphs = runner.graphs

    def steps() -> None:
        if graphs is not None:
            for size in (*TOKENS, *LARGE):
                graphs.capture(size)
        lengths = [size for size in (1, 2, 16, 64, 128, 256, 512, 1024, 4096) if size < runner.max_tokens]
        for total in (1, 2, 16, 48, 100, tokens // 3 * 2 + 1, tokens):
            for length in (*lengths, runner.max_tokens):
                run_once(runner, total, length, every=True)

    aside = contextlib.nullcontext() if graphs is None else graphs.rehearsing()
    rehearse(work, runner.device, steps, aside, progress)
