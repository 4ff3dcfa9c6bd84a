"""The offline face: blocking calls over an AsyncEngine that lives on a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from headrace.config.spec import EngineSpec
from headrace.errors import ConfigError, InvalidRequest, nearest
from headrace.llm.async_engine import AsyncEngine, PromptLike
from headrace.llm.protocols import Messages, Prompt
from headrace.llm.results import Result
from headrace.types import EncodeParams, SamplingParams

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["LLM"]

T = TypeVar("T")
Advance = Callable[[], None]


class LLM:
    """A model for offline use.

        llm = LLM("Qwen/Qwen3-0.6B", dtype="bfloat16")
        for result in llm.generate(["Once upon a time", "The sea"], SamplingParams(max_tokens=32)):
            print(result.text)

    Args:
        model: packaged name, folder, GGUF file or hub id; or an AsyncEngine already made.
        options: fields of EngineSpec.

    Use it as a context manager, or call ``close``; either stops the engine core.
    """

    def __init__(
        self, model: str | EngineSpec | Callable[[], Awaitable[AsyncEngine]], **options: Any
    ) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="headrace-llm", daemon=True)
        self._thread.start()
        try:
            self.engine: AsyncEngine = self._wait(_start(model, options))
        except BaseException:
            self._stop_loop()
            raise

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:  # also Ctrl-C: what runs is aborted before the exception goes on
            future.cancel()
            raise

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def close(self) -> None:
        """Stop the engine core. Further calls fail."""
        if not self._loop.is_closed():
            self._wait(self.engine.close(drain=False))
            self._stop_loop()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        params: SamplingParams | None = None,
        *,
        n: int = 1,
        best_of: int | None = None,
        progress: bool = True,
        **options: Any,
    ) -> list[Result]:
        """Complete every prompt (text, token ids, or a list of either); results in the same order."""
        items = as_prompts(prompts)
        calls = [
            lambda item=item: self.engine.complete(item, params, n=n, best_of=best_of, **options)
            for item in items
        ]
        return self._run_all(calls, "generate", progress)

    def chat(
        self,
        conversations: Messages | Sequence[Messages],
        params: SamplingParams | None = None,
        *,
        n: int = 1,
        best_of: int | None = None,
        progress: bool = True,
        template_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> list[Result]:
        """Answer one conversation (a list of messages) or several; results in the same order.

        Args:
            template_options: ``tools``, ``documents`` and variables for the chat template.
        """
        several = bool(conversations) and not isinstance(conversations[0], dict)
        talks: Sequence[Any] = conversations if several else [conversations]

        async def answer(messages: Messages) -> Result:
            cut = options.get("truncate_prompt_tokens") is not None
            prompt = await self.engine.chat_prompt(messages, cut=cut, **(template_options or {}))
            return await self.engine.complete(prompt, params, n=n, best_of=best_of, **options)

        return self._run_all([lambda talk=talk: answer(talk) for talk in talks], "chat", progress)  # type: ignore[misc]

    def embed(
        self,
        inputs: PromptLike | Sequence[PromptLike],
        params: EncodeParams | None = None,
        *,
        progress: bool = True,
        **options: Any,
    ) -> npt.NDArray[np.float32]:
        """One float32 vector an input: array [inputs, dimensions]."""
        import numpy as np

        async def one(item: PromptLike) -> npt.NDArray[np.float32]:
            output = (await self.engine.embed([item], params, **options)).outputs[0]
            return np.frombuffer(output.data, dtype="<f4").reshape(output.shape)

        items = as_prompts(inputs)
        rows = self._run_all([lambda item=item: one(item) for item in items], "embed", progress)  # type: ignore[misc]
        return np.stack(rows) if rows else np.empty((0, 0), np.float32)

    def _run_all(
        self, calls: Sequence[Callable[[], Coroutine[Any, Any, T]]], what: str, progress: bool
    ) -> list[T]:
        """Run all calls together, at most twice a full batch of them in flight."""
        at_once = 2 * self.engine.client.ready.max_num_seqs

        async def work(advance: Advance) -> list[T]:
            places = asyncio.Semaphore(at_once)

            async def one(call: Callable[[], Coroutine[Any, Any, T]]) -> T:
                async with places:
                    result = await call()
                advance()
                return result

            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(call)) for call in calls]
            return [task.result() for task in tasks]

        with _bar(what, len(calls), progress and len(calls) > 1) as advance:
            try:
                return self._wait(work(advance))
            except BaseExceptionGroup as group:  # the caller made one call and gets its first error
                raise group.exceptions[0] from None


async def _start(model: Any, options: dict[str, Any]) -> AsyncEngine:
    if callable(model):
        made: AsyncEngine = await model()
        return made
    spec = model if isinstance(model, EngineSpec) else EngineSpec(model=model, **_known(options))
    from headrace.llm.progress import LoadingBars

    return await AsyncEngine.start(spec, LoadingBars().of(spec.name))


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """The options, or ConfigError naming the first that EngineSpec does not have."""
    fields = EngineSpec.__struct_fields__
    for name in options:
        if name not in fields:
            raise ConfigError(f"LLM has no option {name!r}{nearest(name, fields)}", param=name)
    return options


def as_prompts(prompts: PromptLike | Sequence[PromptLike]) -> list[PromptLike]:
    """A list of prompts from one prompt (text, ids, Prompt) or several."""
    if isinstance(prompts, (str, Prompt)):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]
    items = list(prompts)
    if any(isinstance(item, int) for item in items):
        raise InvalidRequest("prompts mixes token ids with texts; give one list of ids, or a list of prompts")
    return items  # type: ignore[return-value]


def _bar(what: str, total: int, show: bool) -> AbstractContextManager[Advance]:
    """A progress bar whose value is the function that moves it by one."""
    if not show:
        return nullcontext(lambda: None)
    from headrace.llm.progress import bar

    return bar(what, total)
