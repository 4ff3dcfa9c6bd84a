"""A bounded queue before each model: beyond it 429, with a guess of when there will be room."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from headrace.errors import Overloaded
from headrace.serving.metrics import Metrics
from headrace.serving.places import Places, refused

if TYPE_CHECKING:
    from headrace.serving.state import Model

__all__ = ["Admission", "Rate"]

_LONGEST_WAIT = 60.0


class Rate:
    """Events per second, averaged over about the last ``window`` seconds."""

    def __init__(self, window: float = 10.0) -> None:
        self._window = window
        self._value = 0.0
        self._at: float | None = None

    def add(self, count: int, now: float) -> None:
        if self._at is None:
            self._at = now - self._window / 2
        gap = max(1e-3, now - self._at)
        keep = 2.0 ** (-2.0 * gap / self._window)
        self._value = keep * self._value + (1 - keep) * (count / gap)
        self._at = now

    def value(self, now: float) -> float:
        """The rate, falling while nothing happens; 0 before the first event."""
        if self._at is None:
            return 0.0
        return self._value * float(2.0 ** (-2.0 * (now - self._at) / self._window))


class Admission:
    """Lets sequences into the house while there are places.

    Args:
        places: those taken, by this process or by all that serve together.
        processes: how many serve together, each with about the same share.
    """

    def __init__(self, metrics: Metrics, places: Places | None = None, processes: int = 1) -> None:
        self._metrics = metrics
        self._places = places or Places()
        self._processes = processes
        self._rates: dict[str, Rate] = {}

    @contextmanager
    def place(self, model: Model, count: int) -> Iterator[None]:
        """Hold ``count`` places; raises Overloaded when the queue is full.

        A request that is larger than the whole queue gets in when it is alone.
        """
        name = model.name
        inside = self._places.take(name, count, model.limit)
        if refused(inside, count, model.limit):
            excess = inside + count - model.limit
            self._metrics.model(name).rejected += count
            raise Overloaded(
                f"model {name!r} has {inside} requests and takes {model.limit}; retry later",
                retry_after=self.wait(name, excess),
            )
        try:
            yield
        finally:
            self._places.give_back(name, count)
            self._rates.setdefault(name, Rate()).add(count, time.monotonic())

    def wait(self, name: str, excess: int) -> float:
        """Seconds until ``excess`` places should be free at the recent rate, between 1 and 60."""
        rate = self._rates[name].value(time.monotonic()) if name in self._rates else 0.0
        rate *= self._processes
        return min(_LONGEST_WAIT, max(1.0, excess / rate)) if rate > 0 else 1.0
