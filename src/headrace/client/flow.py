"""Many jobs at once, results in order, memory bounded."""

from __future__ import annotations

import asyncio
import collections
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Generic, Protocol, TypeVar

__all__ = ["Flow"]


class _Indexed(Protocol):
    index: int


J = TypeVar("J", bound=_Indexed)
A = TypeVar("A")
R = TypeVar("R")


class _Feed(Generic[J]):
    """Takes from an iterator; in a thread, some at a time, when the iterator is the caller's own code."""

    def __init__(self, source: Iterator[J], in_thread: bool) -> None:
        self._source = source
        self._in_thread = in_thread
        self._ready: collections.deque[J] = collections.deque()
        self._lock = asyncio.Lock()
        self._done = False

    async def next(self) -> J | None:
        if not self._in_thread:
            return next(self._source, None)
        if not self._ready and not self._done:
            async with self._lock:
                if not self._ready and not self._done:
                    loop = asyncio.get_running_loop()
                    some = await loop.run_in_executor(None, list, itertools.islice(self._source, 64))
                    self._ready.extend(some)
                    self._done = not some
        return self._ready.popleft() if self._ready else None


class Flow(Generic[J, A, R]):
    """Workers that take jobs, send them and parse the answers, and a reader that gets the results in order.

    Args:
        jobs: their ``index`` counts from 0.
        parse: from job and answer to result.
        send: from job to answer.
        ahead, in_thread, on_error: see ``Operation.stream``.
    """

    def __init__(
        self,
        jobs: Iterable[J],
        parse: Callable[[J, A], R],
        send: Callable[[J], Awaitable[A]],
        *,
        ahead: int | None,
        in_thread: bool,
        on_error: Callable[[J, Exception], R] | None,
    ) -> None:
        self._feed: _Feed[J] = _Feed(iter(jobs), in_thread)
        self._parse, self._send, self._on_error = parse, send, on_error
        self._ahead = ahead
        self._done: dict[int, R] = {}
        self._wanted = 0
        self._running = 0
        self._error: BaseException | None = None
        self._news, self._room = asyncio.Event(), asyncio.Event()
        self._workers: list[asyncio.Task[None]] = []

    def fail(self, error: BaseException) -> None:
        """End with this error, unless there is one already."""
        if self._error is None:
            self._error = error
        self._news.set()

    async def run(self, width: int) -> AsyncIterator[R]:
        """Results in order, from ``width`` workers. Call ``close`` afterwards, however it ends."""
        self._running = width
        self._workers = [asyncio.ensure_future(self._work()) for _ in range(width)]
        for self._wanted in itertools.count():
            self._room.set()
            while self._wanted not in self._done and self._error is None:
                if not self._running:
                    return
                self._news.clear()
                await self._news.wait()
            if self._error is not None:
                raise self._error
            yield self._done.pop(self._wanted)

    async def close(self) -> None:
        """Cancel what still runs, and wait until it has ended."""
        for task in self._workers:
            task.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)

    async def _work(self) -> None:
        try:
            while (job := await self._feed.next()) is not None:
                while self._ahead is not None and job.index >= self._wanted + self._ahead:
                    self._room.clear()
                    await self._room.wait()
                self._done[job.index] = await self._result(job)
                if job.index == self._wanted:
                    self._news.set()
        except Exception as error:
            self.fail(error)
        finally:
            self._running -= 1
            self._news.set()

    async def _result(self, job: J) -> R:
        if self._on_error is None:
            return self._parse(job, await self._send(job))
        try:
            return self._parse(job, await self._send(job))
        except Exception as error:
            return self._on_error(job, error)
