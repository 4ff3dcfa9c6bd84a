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
from headrace.serving.exchange import current
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
    _tell_cut(body, generation, engine.max_model_len)
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


def _tell_cut(body: GenerateFields, generation: Generation, context: int) -> None:
    """A limit beyond the context is cut to it, as the hosted system does, and not in silence."""
    fields = [
        name for name in ("max_completion_tokens", "max_tokens") if getattr(body, name, None) is not None
    ]
    room = min(choice.params.max_tokens or 0 for choice in generation.choices)
    if fields and (asked := getattr(body, fields[0])) > room:
        told = f"the limit of {asked} output tokens was cut to {room}: the context of {context} holds no more"
        current().warnings += (told,)


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
