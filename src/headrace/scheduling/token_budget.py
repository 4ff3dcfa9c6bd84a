"""The queue of the encode loop: one pass each, batched by tokens. Plain Python over plain data.

There is no timer: whoever waits when the device becomes free goes with the next batch.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

__all__ = ["TokenBudgetQueue", "Waiting"]


class Waiting(msgspec.Struct, frozen=True, gc=False):
    """One sequence that waits for its single pass.

    Attributes:
        id: unique among those waiting.
        num_tokens: its length, at least 1.
        priority: lower goes first; equal ones in order of arrival.
        deadline: seconds of the monotonic clock after which it must not run; None: never.
    """

    id: str
    num_tokens: int
    priority: int = 0
    deadline: float | None = None


@dataclass(slots=True)
class TokenBudgetQueue:
    """Batches of at most ``max_tokens`` tokens and ``max_seqs`` sequences, first come first served.

    A sequence longer than ``max_tokens`` goes alone. Nobody is overtaken: a batch ends at the first waiting
    sequence that does not fit, and that one leads the next batch. ``remove`` costs O(1): the dead entry is
    dropped when it reaches the head of the heap.

    Attributes:
        max_tokens: tokens of one batch.
        max_seqs: sequences of one batch.
        num_tokens: tokens that wait now.
    """

    max_tokens: int
    max_seqs: int
    num_tokens: int = 0
    _heap: list[tuple[int, int, Waiting]] = field(default_factory=list)
    _live: dict[str, tuple[int, int]] = field(default_factory=dict)  # id -> (arrival, tokens)
    _arrivals: itertools.count[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        assert self.max_tokens > 0
        assert self.max_seqs > 0

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, id: str) -> bool:
        return id in self._live

    def add(self, item: Waiting) -> None:
        """Append; an id must not wait twice."""
        assert item.id not in self._live, f"{item.id} waits already"
        assert item.num_tokens > 0
        arrival = next(self._arrivals)
        self._live[item.id] = (arrival, item.num_tokens)
        self.num_tokens += item.num_tokens
        heapq.heappush(self._heap, (item.priority, arrival, item))

    def remove(self, ids: Iterable[str]) -> int:
        """Forget these; unknown ids are ignored. Returns how many were waiting."""
        removed = 0
        for id in ids:
            entry = self._live.pop(id, None)
            if entry is not None:
                removed += 1
                self.num_tokens -= entry[1]
        if not self._live:
            self._heap.clear()
        return removed

    def next_batch(self, now: float) -> tuple[list[str], list[str]]:
        """Take the next batch out of the queue.

        Args:
            now: seconds of the monotonic clock.
        Returns:
            ids to run, shortest first (so that equal lengths lie together), and ids whose deadline passed.
        """
        batch: list[Waiting] = []
        expired: list[str] = []
        tokens = 0
        while self._heap and len(batch) < self.max_seqs:
            _, arrival, item = self._heap[0]
            if not self._is(item, arrival):
                heapq.heappop(self._heap)
                continue
            late = item.deadline is not None and item.deadline <= now
            if not late and batch and tokens + item.num_tokens > self.max_tokens:
                break
            heapq.heappop(self._heap)
            del self._live[item.id]
            self.num_tokens -= item.num_tokens
            if late:
                expired.append(item.id)
            else:
                batch.append(item)
                tokens += item.num_tokens
        batch.sort(key=lambda item: item.num_tokens)
        return [item.id for item in batch], expired

    def _is(self, item: Waiting, arrival: int) -> bool:
        """Whether this heap entry still stands for a waiting sequence (ids may come back after removal)."""
        entry = self._live.get(item.id)
        return entry is not None and entry[0] == arrival
