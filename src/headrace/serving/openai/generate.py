"""What chat completions and completions do alike: admit, run, answer as a whole or as a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Any, Protocol

from aiohttp import web

from headrace.llm import AsyncEngine, Completion, Generation
from headrace.llm.async_engine import best, ranked
from headrace.llm.protocols import Prompt
from headrace.llm.results import Collector
from headrace.serving.call import Call
from headrace.serving.openai.common import GenerateFields
from headrace.serving.openai.replies import encode
from headrace.serving.openai.sampling import num_choices
from headrace.serving.streaming import Writer, send_stream
from headrace.serving.verify import Verifier
from headrace.types import SamplingParams

__all__ = ["Answer", "answer", "reply_id"]


class Answer(Writer, Protocol):
    """One API's way to write a call's result."""

    def take(self, choices: list[Completion]) -> None:
        """Whole choices, instead of deltas."""
        ...

    def reply(self) -> Any:
        """The whole reply to what was taken, for msgspec."""
        ...


def reply_id(prefix: str) -> tuple[str, int]:
    """A fresh id and the time of creation in seconds."""
    return f"{prefix}-{uuid.uuid4().hex}", int(time.time())


async def answer(
    call: Call,
    engine: AsyncEngine,
    body: GenerateFields,
    prompts: list[Prompt],
    params: SamplingParams,
    make: Callable[[Generation], Answer],
    verifier: Verifier | None = None,
    visible: frozenset[int] = frozenset(),
) -> web.StreamResponse:
    """Run the prompts and answer. ``verifier`` looks at each text before it is called finished."""
    n, runs = num_choices(body)
    generation = engine.open(
        prompts,
        ranked(params, n, runs),
        n=runs,
        truncate_prompt_tokens=body.truncate_prompt_tokens,
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
        deadline=call.deadline,
        visible=visible,
    )
    call.record.follow(generation)
    writer = make(generation)
    if body.stream:
        return await send_stream(call, generation, writer, verifier)
    choices = await _collect(generation, call)
    kept: list[Completion] = []
    for place in range(len(prompts)):
        own = choices[place * runs : (place + 1) * runs]
        for completion in best(own, n, keep_logprobs=params.logprobs is not None):
            completion.index = len(kept)
            kept.append(completion)
    writer.take(kept)
    if verifier is not None:
        for completion in kept:
            await verifier.look(writer.turn(completion.index), completion)
    return web.Response(body=encode(writer.reply()), content_type="application/json")


async def _collect(generation: Generation, call: Call) -> list[Completion]:
    collector = Collector(len(generation.choices))
    try:
        async for deltas in generation:
            call.record.tokens(deltas)
            for delta in deltas:
                collector.add(delta)
    finally:
        await generation.aclose()
    return collector.finish()
