"""Texts of many requests in one batch of the tokenizer."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from headrace.llm.tokenizing import TokenizeQueue

LONG = "x" * 300  # not worth keeping on the event loop


class Tokenizer:
    """Notes its batches; waits for leave before the first one in a thread; cannot read "bad"."""

    def __init__(self) -> None:
        self.batches: list[tuple[list[str], bool]] = []
        self.leave = threading.Event()
        self.inline: list[str] = []

    def __call__(self, texts: list[str], special: bool) -> list[str]:
        if threading.current_thread() is threading.main_thread():
            self.inline += texts
        else:
            assert self.leave.wait(10)
            self.batches.append((texts, special))
        if any("bad" in text for text in texts):
            raise TypeError("half of a pair")
        return [f"{text}|{special}" for text in texts]


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_who_waits_is_the_next_batch() -> None:
    async def run() -> None:
        tokenizer = Tokenizer()
        with ThreadPoolExecutor(2) as threads:
            queue = TokenizeQueue(tokenizer, threads)
            assert await queue.encode(["short"], True) == ["short|True"]
            assert tokenizer.inline == ["short"]
            first = [asyncio.create_task(queue.encode([LONG + str(i)], True)) for i in range(2)]
            await settle()  # both threads are busy
            plain = asyncio.create_task(queue.encode(["no special"], False))
            rest = [asyncio.create_task(queue.encode([f"a{i}", f"b{i}"], True)) for i in range(5)]
            gone = asyncio.create_task(queue.encode(["gone"], True))
            await settle()
            gone.cancel()
            await settle()
            tokenizer.leave.set()
            assert [await task for task in first] == [[f"{LONG}{i}|True"] for i in range(2)]
            assert await plain == ["no special|False"]
            assert [await task for task in rest] == [[f"a{i}|True", f"b{i}|True"] for i in range(5)]
            with pytest.raises(asyncio.CancelledError):
                await gone
        sizes = sorted(len(texts) for texts, _ in tokenizer.batches)
        assert sizes == [1, 1, 1, 10]
        assert tokenizer.inline == ["short"], "short texts wait behind others instead of holding up the loop"

    asyncio.run(run())


def test_only_the_request_at_fault_fails() -> None:
    async def run() -> None:
        tokenizer = Tokenizer()
        with ThreadPoolExecutor(1) as threads:
            queue = TokenizeQueue(tokenizer, threads)
            texts = [[LONG], ["good"], ["fine", "bad"], ["also good"]]
            tasks = [asyncio.create_task(queue.encode(one, True)) for one in texts]
            await settle()
            tokenizer.leave.set()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [list, list, TypeError, list]
        assert results[3] == ["also good|True"]

    asyncio.run(run())


def test_long_batches_are_parted() -> None:
    async def run() -> None:
        tokenizer = Tokenizer()
        tokenizer.leave.set()
        with ThreadPoolExecutor(1) as threads:
            queue = TokenizeQueue(tokenizer, threads)
            found = await asyncio.gather(*(queue.encode(["y" * 100_000 + str(i)], True) for i in range(7)))
        assert [row[0][-6:] for row in found] == [f"{i}|True" for i in range(7)]
        assert max(sum(map(len, texts)) for texts, _ in tokenizer.batches) <= 1 << 18

    asyncio.run(run())
