"""A running call: one or more prompts, each with one or more choices, as one stream of deltas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, cast

from headrace.engines.client import EngineClient
from headrace.llm.choice import Choice, Delta
from headrace.llm.protocols import Prompt
from headrace.types import TokenLogprobs, Usage

__all__ = ["Delta", "Generation"]


class Generation:
    """Iterate it for lists of deltas: one list holds everything that is there at that moment.

    Choice ``k`` of prompt ``p`` has index ``p * n + k``. Closing it (``aclose``, cancellation) aborts
    whatever still runs. ``usage`` is right at every moment, also after an abort.
    """

    def __init__(self, client: EngineClient, prompts: Sequence[Prompt], choices: Sequence[Choice]) -> None:
        self._client = client
        self._stream = self._one(choices[0]) if len(choices) == 1 else self._merged()
        self.prompts = tuple(prompts)
        self.choices = tuple(choices)

    def __aiter__(self) -> AsyncIterator[list[Delta]]:
        return self._stream

    async def aclose(self) -> None:
        """Abort what still runs."""
        await self._stream.aclose()

    @property
    def choices_per_prompt(self) -> int:
        return len(self.choices) // len(self.prompts)

    @property
    def usage(self) -> Usage:
        """Tokens so far: every prompt counted once, every sampled token counted."""
        each = self.choices_per_prompt
        return Usage(
            prompt_tokens=sum(len(prompt.token_ids) for prompt in self.prompts),
            completion_tokens=sum(choice.num_tokens for choice in self.choices),
            cached_tokens=sum(choice.num_cached for choice in self.choices[::each]),
        )

    def prompt_logprobs(self, prompt: int) -> tuple[TokenLogprobs, ...]:
        """One entry a token of that prompt from the second on; empty before the first delta."""
        return self.choices[prompt * self.choices_per_prompt].prompt_logprobs

    async def _one(self, choice: Choice) -> AsyncGenerator[list[Delta], None]:
        outputs = cast("AsyncGenerator[Any, None]", self._client.generate(choice.request))
        async with aclosing(outputs):
            async for output in outputs:
                delta = choice.feed(output)
                if delta is not None:
                    yield [delta]
                if choice.finished:
                    return

    async def _merged(self) -> AsyncGenerator[list[Delta], None]:
        queue: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue()
        tasks = [asyncio.create_task(self._pump(choice, queue)) for choice in self.choices]
        running = len(tasks)
        try:
            while running:
                items = [await queue.get()]
                while not queue.empty():
                    items.append(queue.get_nowait())
                for item in items:
                    if isinstance(item, BaseException):
                        raise item
                running -= items.count(None)
                deltas = [item for item in items if isinstance(item, Delta)]
                if deltas:
                    yield deltas
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, choice: Choice, queue: asyncio.Queue[Delta | BaseException | None]) -> None:
        try:
            async with aclosing(self._one(choice)) as stream:
                async for deltas in stream:
                    queue.put_nowait(deltas[0])
        except Exception as error:  # handed to the consumer, which raises it
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)
