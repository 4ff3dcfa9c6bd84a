"""Tokenization of many requests together, off the event loop.

What waits while the tokenizer is busy is its next batch, as with the device: no timers. A thread for each text would
wait for Python's lock at its start and its end, and so be slower than the event loop alone; one batch takes the lock
twice for all of its texts, and the tokenizer spreads them over the cores.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

__all__ = ["TokenizeQueue"]

T = TypeVar("T")
_INLINE_CHARS = 256  # of a request that finds nobody waiting: a hop to a thread costs more
_BATCH_CHARS = 1 << 18  # a longer batch would keep its first text waiting for its last
_AT_ONCE = 2  # batches, so that one very long text does not hold up all others


@dataclass(slots=True)
class _Waiting(Generic[T]):
    texts: Sequence[str]
    chars: int
    special: bool
    done: asyncio.Future[list[T]]


class TokenizeQueue(Generic[T]):
    """Batches of texts for one tokenizer; lives on one event loop.

    Args:
        encode: texts and whether special tokens are added -> one encoding each. Called in threads; it must raise
            for a text that it cannot read.
        threads: where it runs.
    """

    def __init__(self, encode: Callable[[list[str], bool], list[T]], threads: Executor) -> None:
        self._encode, self._threads = encode, threads
        self._waiting: deque[_Waiting[T]] = deque()
        self._running = 0

    async def encode(self, texts: Sequence[str], special: bool) -> list[T]:
        """One encoding for each text; raises what the tokenizer raises for these texts, never for others'."""
        chars = sum(map(len, texts))
        if chars <= _INLINE_CHARS and not self._running:
            return self._encode(list(texts), special)
        done: asyncio.Future[list[T]] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(texts, chars, special, done))
        self._start()
        return await done

    def _start(self) -> None:
        while self._waiting and self._running < _AT_ONCE:
            batch = self._next()
            if not batch:
                return
            self._running += 1
            future = asyncio.get_running_loop().run_in_executor(self._threads, self._run, batch)
            future.add_done_callback(partial(self._finish, batch))

    def _next(self) -> list[_Waiting[T]]:
        """Those who came first and want the same, up to the limit; who has left costs nothing."""
        batch: list[_Waiting[T]] = []
        chars = 0
        while self._waiting:
            first = self._waiting[0]
            if not first.done.done():
                if batch and (first.special != batch[0].special or chars + first.chars > _BATCH_CHARS):
                    break
                batch.append(first)
                chars += first.chars
            self._waiting.popleft()
        return batch

    def _run(self, batch: list[_Waiting[T]]) -> list[list[T] | Exception]:
        """In a thread. If a batch fails, each request of it is read alone, so that only those at fault fail."""
        try:
            found = self._encode([text for one in batch for text in one.texts], batch[0].special)
        except Exception as error:
            if len(batch) == 1:
                return [error]
            return [result for one in batch for result in self._run([one])]
        parts: list[list[T] | Exception] = []
        at = 0
        for one in batch:
            parts.append(found[at : at + len(one.texts)])
            at += len(one.texts)
        return parts

    def _finish(self, batch: list[_Waiting[T]], finished: asyncio.Future[list[list[T] | Exception]]) -> None:
        self._running -= 1
        error: BaseException | None = (
            asyncio.CancelledError() if finished.cancelled() else finished.exception()
        )
        results: Sequence[list[T] | BaseException] = [error] * len(batch) if error else finished.result()
        for one, result in zip(batch, results, strict=True):
            if one.done.done():
                continue
            if isinstance(result, BaseException):
                one.done.set_exception(result)
            else:
                one.done.set_result(result)
        self._start()
