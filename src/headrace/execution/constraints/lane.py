"""Compilations in a queue, worked through by a thread that can be given up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue

from headrace.execution.constraints.constraint import Constraint
from headrace.types import ConstraintSpec

__all__ = ["Compilation", "Lane"]


@dataclass(slots=True, eq=False)
class Compilation:
    """A grammar on its way.

    Attributes:
        spec: what is compiled.
        future: gives the Constraint; raises InvalidRequest when the grammar is refused.
        deadline: time.monotonic() after which nobody waits for it; None: it waits for its turn, or is done.
        lane: where it is compiled.
        grammar: llguidance's form of it, once that is known.
    """

    spec: ConstraintSpec
    future: Future[Constraint] = field(default_factory=Future)
    deadline: float | None = None
    lane: Lane | None = None
    grammar: str = ""

    @property
    def late(self) -> bool:
        """Whether it has taken too long."""
        return self.deadline is not None and time.monotonic() > self.deadline


class Lane:
    """A thread that works through a queue, and that can be replaced when it does not come back.

    Args:
        work: what to do with each compilation.
        prepare: called first on every thread of the lane.
    """

    def __init__(
        self, work: Callable[[Compilation], None], prepare: Callable[[], None] | None = None
    ) -> None:
        self._work = work
        self._prepare = prepare
        self._queue: SimpleQueue[Compilation | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self.num_stuck = 0

    def put(self, one: Compilation) -> None:
        one.lane = self
        self._queue.put(one)
        if self._thread is None:
            self.replace()

    def replace(self) -> None:
        """Go on with a new thread; the old one ends when it comes back."""
        self._thread = threading.Thread(target=self._run, name="headrace-grammar", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._queue.put(None)

    def _run(self) -> None:
        if self._prepare is not None:
            self._prepare()
        me = threading.current_thread()
        while (one := self._queue.get()) is not None:
            self._work(one)
            if self._thread is not me:
                self.num_stuck -= 1
                return
