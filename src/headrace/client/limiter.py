"""How many requests may be in flight, learned from the server's answers."""

from __future__ import annotations

import asyncio
import collections
import time

__all__ = ["AdaptiveLimit"]


class AdaptiveLimit:
    """Additive increase, multiplicative decrease (Chiu and Jain 1989), with a brake on latency.

    Each answered request adds ``1 / limit`` (so about one more a round trip); a 429, a 503 or a network fault
    takes 30%, once a round trip. When answers take over ``slow`` times as long as they did at best, the limit
    stops growing; over twice that, it shrinks.

    Args:
        start, low, high: the limit at first and its bounds.
        slow: from which multiple of the best mean latency on the limit does not grow.
    """

    def __init__(self, start: int = 16, low: int = 1, high: int = 256, slow: float = 3.0) -> None:
        self.limit = float(min(max(start, low), high))
        self.low, self.high, self.slow = low, high, slow
        self.active = 0
        self._waiting: collections.deque[asyncio.Future[None]] = collections.deque()
        self._mean = 0.0
        self._best = 0.0
        self._seen = 0
        self._not_before = 0.0

    async def __aenter__(self) -> None:
        while self.active >= int(self.limit):
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                elif turn.done() and not turn.cancelled():
                    self._wake()  # the turn was ours and is not taken
                raise
        self.active += 1

    async def __aexit__(self, *_: object) -> None:
        self.active -= 1
        self._wake()

    def _wake(self) -> None:
        for _ in range(int(self.limit) - self.active):
            while self._waiting:
                turn = self._waiting.popleft()
                if not turn.done():
                    turn.set_result(None)
                    break

    def saw(self, status: int, seconds: float) -> None:
        """One attempt's end: its HTTP status (0: no reply) and how long it took."""
        if status in (0, 429, 503):
            now = time.monotonic()
            if now >= self._not_before:
                self.limit = max(self.low, self.limit * 0.7)
                self._not_before = now + max(self._mean, 0.05)
            return
        self._seen += 1
        self._mean += (seconds - self._mean) / min(self._seen, 32)
        if self._seen >= 8:
            self._best = min(self._best or self._mean, self._mean)
        if self._best and self._mean > 2 * self.slow * self._best:
            self.limit = max(self.low, self.limit - 0.5 / self.limit)
        elif self.active >= int(self.limit) - 1 and self._mean <= self.slow * (self._best or self._mean):
            self.limit = min(self.high, self.limit + 1 / self.limit)  # only a limit that is used may grow
        self._wake()
