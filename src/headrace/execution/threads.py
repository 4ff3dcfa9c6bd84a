"""How many threads a CPU step uses: as many as there are cores that nobody else keeps busy.

PyTorch's threads meet after every operation. Where another process holds one of the cores, each meeting waits for
the scheduler's time slice, and a step takes 5 to 100 times as long; with one thread less it is hardly slower than
that share of the machine. So the count follows the load of the others, some times a second.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

__all__ = ["ThreadGovernor"]

_WINDOW = 0.15  # seconds; the kernel counts in hundredths
_SHARE = 0.6  # of a core that must be free for a thread to start or stay on it
_PATIENCE = 2  # windows with a free core before a thread is added

Ticks = tuple[float, float]  # of all cores together: passed, idle


def _read_ticks() -> Ticks | None:
    """From /proc/stat; None where there is none. Processes with a nice value stand back, so their time is idle."""
    try:
        with open("/proc/stat", "rb") as file:
            fields = [float(word) for word in file.readline().split()[1:9]]
    except (OSError, ValueError):
        return None
    return (sum(fields), fields[1] + fields[3] + fields[4]) if len(fields) >= 5 else None


class ThreadGovernor:
    """Sets torch's threads before a step; call it on the thread that runs the model.

    Args:
        most: threads when the machine is ours alone.
        cores: of the machine, as the ticks count them.
        read, clock, own: the machine's ticks, the time, and this process's CPU seconds.
        apply: takes the new number.
    """

    def __init__(
        self,
        most: int,
        *,
        cores: int | None = None,
        read: Callable[[], Ticks | None] = _read_ticks,
        clock: Callable[[], float] = time.monotonic,
        own: Callable[[], float] = time.process_time,
        apply: Callable[[int], None] = torch.set_num_threads,
    ) -> None:
        self.most = self.threads = most
        self._cores = cores or os.cpu_count() or 1
        self._read, self._clock, self._own, self._apply = read, clock, own, apply
        self._last: tuple[float, float, Ticks] | None = None
        self._roomy = 0

    def adjust(self) -> int:
        """Follow the load since the last window; cheap when the window is not over."""
        now = self._clock()
        if self.most == 1 or (self._last is not None and now - self._last[0] < _WINDOW):
            return self.threads
        ticks, own = self._read(), self._own()
        if ticks is None:
            return self.threads
        last, self._last = self._last, (now, own, ticks)
        if last is None or now - last[0] > 10 * _WINDOW or ticks[0] <= last[2][0]:
            return self.threads  # idle in between: the load of then says little about now
        busy = self._cores * (1 - (ticks[1] - last[2][1]) / (ticks[0] - last[2][0]))
        others = max(busy - (own - last[1]) / (now - last[0]), 0.0)
        self._set(min(max(int(self._cores - others + 1 - _SHARE), 1), self.most))
        return self.threads

    def _set(self, wanted: int) -> None:
        self._roomy = self._roomy + 1 if wanted > self.threads else 0
        if wanted < self.threads or self._roomy >= _PATIENCE:
            self.threads = wanted
            self._roomy = 0
            self._apply(wanted)
