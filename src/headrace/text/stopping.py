"""Stop strings in streamed text."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.errors import InvalidRequest

__all__ = ["StopMatcher"]


class StopMatcher:
    """Finds the stop string that is complete first, and holds back only what may still become one.

    The result does not depend on how the text is split over calls. When two stop strings end at the same
    character, the longer one counts. Matching is Knuth, Morris and Pratt's (1977): constant work a character
    and stop string, however long the strings are.

    Args:
        stops: the strings; none may be empty.
        include_stop: leave the stop string at the end of the text instead of cutting it off.

    Attributes:
        matched: the stop string found, once there is one.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        if not all(stops):
            raise InvalidRequest("stop holds an empty string; give at least one character", param="stop")
        self._stops = tuple(stops)
        self._borders = [_borders(stop) for stop in self._stops]
        self._lengths = [0] * len(self._stops)  # of each stop string's start at the end of the text so far
        self._held = ""
        self._include = include_stop
        self.matched: str | None = None

    def push(self, text: str, *, armed: bool = True) -> str:
        """Add text and return what is certain to stay.

        Args:
            armed: False for the first ``min_tokens`` tokens: their text passes through, and no stop string
                may begin in it.

        Nothing comes after a match: the caller stops there.
        """
        if self.matched is not None:
            return ""
        if not armed or not self._stops:
            assert not self._held, "text is armed once and stays so"
            return text
        for position, char in enumerate(text):
            if found := self._step(char):
                self.matched = found
                whole = self._held + text[: position + 1]
                self._held = ""
                return whole if self._include else whole[: len(whole) - len(found)]
        whole = self._held + text
        keep = len(whole) - max(self._lengths, default=0)
        self._held = whole[keep:]
        return whole[:keep]

    def finish(self) -> str:
        """What is still held back, at the end of the sequence."""
        held, self._held = self._held, ""
        return held

    def _step(self, char: str) -> str:
        """Read one character; the longest stop string that ends with it, or ""."""
        found = ""
        for index, stop in enumerate(self._stops):
            length = self._lengths[index]
            borders = self._borders[index]
            while length and stop[length] != char:
                length = borders[length - 1]
            length += stop[length] == char
            self._lengths[index] = length
            if length == len(stop) and length > len(found):
                found = stop
        return found


def _borders(text: str) -> list[int]:
    """For every prefix the length of its longest proper border (a start that is also its end)."""
    borders = [0] * len(text)
    length = 0
    for index in range(1, len(text)):
        while length and text[length] != text[index]:
            length = borders[length - 1]
        length += text[length] == text[index]
        borders[index] = length
    return borders
