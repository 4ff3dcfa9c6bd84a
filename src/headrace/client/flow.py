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


class Flow(Generic[J, R]):
    """Workers that do jobs; their results in order (``run``), or only done (``drain``).

    Args:
        jobs: for ``run`` their ``index`` counts from 0.
        work: from job to result.
        ahead, in_thread, on_error: see ``Operation.stream``.
    """

    def __init__(
        self,
        jobs: Iterable[J],
        work: Callable[[J], Awaitable[R]],
        *,
        ahead: int | None = None,
        in_thread: bool = False,
        on_error: Callable[[J, Exception], R] | None = None,
    ) -> None:
        self._feed: _Feed[J] = _Feed(iter(jobs), in_thread)
        self._job, self._on_error = work, on_error
        self._ahead = ahead
        self._done: dict[int, R] | None = None  # finished, not yet wanted
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
        done: dict[int, R] = {}
        self._done = done
        self._begin(width)
        for self._wanted in itertools.count():
            self._room.set()
            while self._wanted not in done and self._error is None:
                if not self._running:
                    return
                self._news.clear()
                await self._news.wait()
            if self._error is not None:
                raise self._error
            yield done.pop(self._wanted)

    async def drain(self, width: int) -> None:
        """Until all jobs are done, in any order, their results dropped. Call ``close`` afterwards."""
        self._begin(width)
        while self._running and self._error is None:
            self._news.clear()
            await self._news.wait()
        if self._error is not None:
            raise self._error

    def _begin(self, width: int) -> None:
        self._running = width
        self._workers = [asyncio.ensure_future(self._work()) for _ in range(width)]

    async def close(self) -> None:
        """Cancel what still runs, and wait until it has ended."""
        for task in self._workers:
            task.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)

    async def _work(self) -> None:
        work, on_error, done = self._job, self._on_error, self._done
        try:
            while (job := await self._feed.next()) is not None:
                while self._ahead is not None and job.index >= self._wanted + self._ahead:
                    self._room.clear()
                    await self._room.wait()
                try:
                    result = await work(job)
                except Exception as error:
                    if on_error is None:
                        raise
                    result = on_error(job, error)
                if done is not None:
                    done[job.index] = result
                    if job.index == self._wanted:
                        self._news.set()
        except Exception as error:
            self.fail(error)
        finally:
            self._running -= 1
            self._news.set()
