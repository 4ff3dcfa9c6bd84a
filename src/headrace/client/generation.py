"""Chat and text completions in bulk."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from headrace.client.background import async_face, sync_face
from headrace.client.chat import (
    Answer,
    Conversation,
    chat_bodies,
    generation_jobs,
    parse_answer,
    text_bodies,
)
from headrace.client.core import Core
from headrace.client.limiter import AdaptiveLimit
from headrace.client.operation import Job, Operation
from headrace.client.preference import RequestProcessingPreference
from headrace.client.pump import async_iterator, collected, sync_iterator

__all__ = ["GenerationMethods"]


class GenerationMethods(Core):
    """``chat`` and ``completions``, whole lists or streams of them.

    Common arguments: ``model`` is put into bodies that have none. ``stream`` asks the server for events and puts
    them together (time to the first token is then known, and a broken connection is noticed early).
    ``adaptive`` lets the number of requests in flight follow 429 and latency, up to the preference's
    ``max_concurrent_requests``. ``return_errors`` puts a failure into its Answer instead of raising the first.
    Further keywords (``temperature=0``...) go into every body that does not set them.
    """

    def _chat_stream(
        self,
        /,
        conversations: Iterable[Conversation],
        model: str | None = None,
        preference: RequestProcessingPreference | None = None,
        *,
        stream: bool = False,
        adaptive: bool = True,
        return_errors: bool = False,
        **params: Any,
    ) -> AsyncGenerator[Answer, None]:
        """Answers to any number of conversations, in order. As a stream, in constant memory.

        Args:
            conversations: each a text (one user message), a list of messages, or a whole request body.
        """
        jobs = generation_jobs("/v1/chat/completions", chat_bodies(conversations, model, params), stream)
        return self._generate(jobs, preference, adaptive, return_errors)

    def _completions_stream(
        self,
        /,
        prompts: Iterable[str | Sequence[int] | Mapping[str, Any]],
        model: str | None = None,
        preference: RequestProcessingPreference | None = None,
        *,
        stream: bool = False,
        adaptive: bool = True,
        return_errors: bool = False,
        **params: Any,
    ) -> AsyncGenerator[Answer, None]:
        """Continuations of any number of prompts, in order. As a stream, in constant memory.

        Args:
            prompts: each a text, token ids, or a whole request body.
        """
        jobs = generation_jobs("/v1/completions", text_bodies(prompts, model, params), stream)
        return self._generate(jobs, preference, adaptive, return_errors)

    _chat = collected(_chat_stream)
    _completions = collected(_completions_stream)
    chat = sync_face(_chat)
    async_chat = async_face(_chat)
    chat_stream = sync_iterator(_chat_stream)
    async_chat_stream = async_iterator(_chat_stream)
    completions = sync_face(_completions)
    async_completions = async_face(_completions)
    completions_stream = sync_iterator(_completions_stream)
    async_completions_stream = async_iterator(_completions_stream)

    async def _generate(
        self,
        jobs: Iterable[Job],
        preference: RequestProcessingPreference | None,
        adaptive: bool,
        return_errors: bool,
    ) -> AsyncGenerator[Answer, None]:
        preference = preference or RequestProcessingPreference()
        preference.check()
        width = preference.max_concurrent_requests
        limit = AdaptiveLimit(high=width) if adaptive else None
        operation = Operation(self._target, preference, limit=limit)
        failed: Callable[[Job, Exception], Answer] | None = None
        if return_errors:

            def failed(job: Job, error: Exception) -> Answer:
                return Answer(job.index, {}, error=error)

        stream = operation.stream(
            jobs, parse_answer, width=width, ahead=2 * width, in_thread=True, on_error=failed
        )
        async with aclosing(stream) as answers:
            async for answer in answers:
                yield answer
