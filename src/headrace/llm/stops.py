"""Stop strings in streamed text."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopMatcher"]


class StopMatcher:
    """Finds the first stop string and holds back only what may still become one.

    Attributes:
        matched: the stop string found, once there is one.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include_stop
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, *, armed: bool = True) -> str:
        """Add text and return what is certain to stay; unarmed text passes through."""
        if not armed:
            return text
        self._held += text
        ends = [
            (self._held.find(stop) + len(stop), -len(stop), stop)
            for stop in self._stops
            if stop in self._held
        ]
        if ends:
            end, _, self.matched = min(ends)
            out, self._held = self._held[:end], ""
            return out if self._include else out[: -len(self.matched)]
        cut = len(self._held) - max((_overlap(self._held, stop) for stop in self._stops), default=0)
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def finish(self) -> str:
        """What is still held back, at the end of the sequence."""
        out, self._held = self._held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of ``stop`` that ``text`` ends with."""
    sizes = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
