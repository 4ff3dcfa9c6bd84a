"""What the offline API returns."""

from __future__ import annotations

import msgspec

from headrace.llm.choice import Delta
from headrace.llm.generation import Generation
from headrace.types import FinishReason, TokenLogprobs, Usage

__all__ = ["Completion", "Result", "collect"]


class Completion(msgspec.Struct, kw_only=True):
    """One finished choice.

    Attributes:
        stop_reason: the stop string or stop token id that ended it.
        logprobs: one entry a token if asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] = []

    @property
    def mean_logprob(self) -> float:
        """Log-probability per token: what ``best_of`` ranks by. Needs ``logprobs``."""
        return sum(entry.logprob for entry in self.logprobs) / max(1, len(self.logprobs))


class Result(msgspec.Struct, kw_only=True):
    """The answer to one prompt.

    Attributes:
        prompt: its text, where known.
        prompt_logprobs: one entry a prompt token from the second on if asked for.
    """

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: list[Completion]
    usage: Usage
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.outputs[0].text


class Collector:
    """Joins the deltas of a Generation."""

    def __init__(self, size: int) -> None:
        self._texts: list[list[str]] = [[] for _ in range(size)]
        self.completions = [
            Completion(index=index, text="", token_ids=[], finish_reason=None, logprobs=[])
            for index in range(size)
        ]

    def add(self, delta: Delta) -> None:
        completion = self.completions[delta.index]
        if delta.text:
            self._texts[delta.index].append(delta.text)
        completion.token_ids.extend(delta.token_ids)
        completion.logprobs.extend(delta.logprobs)
        if delta.finish_reason is not None:
            completion.finish_reason = delta.finish_reason
            completion.stop_reason = delta.stop_reason

    def finish(self) -> list[Completion]:
        for completion, pieces in zip(self.completions, self._texts, strict=True):
            completion.text = "".join(pieces)
        return self.completions


async def collect(generation: Generation) -> list[Completion]:
    """Run a Generation to its end: every choice, in order of index."""
    collector = Collector(len(generation.choices))
    try:
        async for deltas in generation:
            for delta in deltas:
                collector.add(delta)
    finally:
        await generation.aclose()
    return collector.finish()
