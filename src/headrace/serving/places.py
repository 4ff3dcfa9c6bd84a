"""Places before each model: counted in this process, or by all HTTP processes of a server together."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["Places", "SharedPlaces", "refused"]


class Places:
    """How many sequences each model has in the house. This one counts for one process."""

    def __init__(self) -> None:
        self._held: dict[str, int] = {}

    def take(self, model: str, count: int, limit: int) -> int:
        """Hold ``count`` more, unless that is over the limit and some are held already.

        Returns how many were held before: ``refused`` tells what that means.
        """
        held = self._held.get(model, 0)
        if not refused(held, count, limit):
            self._held[model] = held + count
        return held

    def give_back(self, model: str, count: int) -> None:
        """Hold so many less."""
        self._held[model] -= count


def refused(held: int, count: int, limit: int) -> bool:
    """Whether ``count`` more are too many. What is larger than the whole queue gets in when it is alone."""
    return held > 0 and held + count > limit


class SharedPlaces(Places):
    """A row of int64 for each process in one mapped file, written by that process alone.

    Reading all rows and writing the own one happens under a lock that the kernel releases when its holder dies.

    Args:
        path: the file; `create` makes it.
        models: canonical names, in the same order in every process.
        row: this process's.
    """

    def __init__(self, path: Path, models: Sequence[str], row: int) -> None:
        self._columns = {name: place for place, name in enumerate(models)}
        self._row = row * len(models)
        self._file = os.open(path, os.O_RDWR)
        self._map = mmap.mmap(self._file, 0)
        self._numbers = memoryview(self._map).cast("q")

    @staticmethod
    def create(path: Path, models: int, rows: int) -> None:
        """Write a file in which nothing is held."""
        path.write_bytes(bytes(8 * models * rows))

    def take(self, model: str, count: int, limit: int) -> int:
        column = self._columns[model]
        with self._lock():
            held = sum(self._numbers[column :: len(self._columns)])
            if not refused(held, count, limit):
                self._numbers[self._row + column] += count
        return held

    def give_back(self, model: str, count: int) -> None:
        self._numbers[self._row + self._columns[model]] -= count

    def clear(self, row: int) -> None:
        """The process of this row is gone, and all that it held."""
        width = len(self._columns)
        for column in range(width):
            self._numbers[row * width + column] = 0

    @contextmanager
    def _lock(self) -> Iterator[None]:
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)
