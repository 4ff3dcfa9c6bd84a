"""Where the seconds of a start go."""

from __future__ import annotations

import os
import time

__all__ = ["Stages", "process_began"]


class Stages:
    """Seconds by part, one part after another; together they are the whole start.

    Args:
        began: seconds of the epoch at which the first part began; None: now.
    """

    def __init__(self, began: float | None = None) -> None:
        self._last = time.time() if began is None else began
        self.seconds: dict[str, float] = {}

    def done(self, part: str) -> None:
        """The time since the last call was ``part``."""
        now = time.time()
        self.seconds[part] = round(self.seconds.get(part, 0.0) + now - self._last, 3)
        self._last = now


def process_began() -> float:
    """Seconds of the epoch at which the system started this process, to 10 ms; where unknown, now."""
    now = time.time()
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])  # field 22, starttime, after boot
        with open("/proc/uptime") as file:
            age = float(file.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return now
    return now - age if 0 <= age < 3600 else now
