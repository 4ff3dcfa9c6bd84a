"""Both faces of an asynchronous iterator that runs on the background loop."""

from __future__ import annotations

import asyncio
import collections
import inspect
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextlib import aclosing
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from headrace.client import background

__all__ = ["async_iterator", "collected", "sync_iterator"]

S = TypeVar("S")
P = ParamSpec("P")
R = TypeVar("R")
_KEPT = 16  # finished items that wait for the caller, at most (one may hold 128 vectors)


class _Pump(Generic[R]):
    """Runs an iterator ahead of its consumer, within bounds, and hands over all that is ready at once."""

    def __init__(self, source: AsyncGenerator[R, None]) -> None:
        self._source = source
        self._ready: collections.deque[R] = collections.deque()
        self._error: BaseException | None = None
        self._task: asyncio.Task[None] | None = None

    async def _run(self) -> None:
        try:
            async for item in self._source:
                while len(self._ready) >= _KEPT:
                    self._room.clear()
                    await self._room.wait()
                self._ready.append(item)
                self._news.set()
        except BaseException as error:
            self._error = error
        finally:
            self._news.set()

    async def take(self) -> list[R]:
        """What is ready, at least one; empty at the end. Raises the source's error after its last item."""
        if self._task is None:
            self._news, self._room = asyncio.Event(), asyncio.Event()
            self._task = asyncio.ensure_future(self._run())
        while not self._ready and not self._task.done() and self._error is None:
            self._news.clear()
            await asyncio.wait(
                {self._task, waiting := asyncio.ensure_future(self._news.wait())},
                return_when=asyncio.FIRST_COMPLETED,
            )
            waiting.cancel()
        items = list(self._ready)
        self._ready.clear()
        self._room.set()
        if not items and self._error is not None:
            raise self._error
        return items

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._source.aclose()


def sync_iterator(
    method: Callable[Concatenate[S, P], AsyncGenerator[R, None]],
) -> Callable[Concatenate[S, P], Generator[R, None, None]]:
    """A blocking generator; leaving it early (``break``, Ctrl-C) stops the work behind it."""

    def face(self: S, /, *args: P.args, **kwargs: P.kwargs) -> Generator[R, None, None]:
        pump = _Pump(method(self, *args, **kwargs))
        try:
            while items := background.run(pump.take()):
                yield from items
        finally:
            background.run(pump.close())

    background.describe(face, method, "")
    return face


def async_iterator(
    method: Callable[Concatenate[S, P], AsyncGenerator[R, None]],
) -> Callable[Concatenate[S, P], AsyncGenerator[R, None]]:
    """An asynchronous generator for the caller's own loop."""

    async def face(self: S, /, *args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[R, None]:
        pump = _Pump(method(self, *args, **kwargs))
        try:
            while items := await asyncio.wrap_future(background.start(pump.take())):
                for item in items:
                    yield item
        finally:
            await asyncio.wrap_future(background.start(pump.close()))

    background.describe(face, method, "async_")
    return face


def collected(
    method: Callable[Concatenate[S, P], AsyncGenerator[R, None]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, list[R]]]:
    """The coroutine that gives all items of ``_name_stream`` as a list; its faces are called ``name``."""

    async def face(self: S, /, *args: P.args, **kwargs: P.kwargs) -> list[R]:
        async with aclosing(method(self, *args, **kwargs)) as items:
            return [item async for item in items]

    background.describe(face, method, "")
    face.__name__ = method.__name__.removesuffix("_stream")
    shown: Any = face
    shown.__signature__ = inspect.signature(method).replace(return_annotation=list)
    return face
