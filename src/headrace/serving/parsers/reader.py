"""Text that arrives in pieces, read by generators that wait for more where they have to.

What a generator decides depends on the text alone and never on how it was cut: each waits until the next
characters, or the end, settle the question. That makes parsing whole and parsing streamed one and the same.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

__all__ = ["Reader", "Reading", "Unfit"]

T = TypeVar("T")
Reading = Generator[None, None, T]
Sink = Callable[[str], None]
_SPACE = " \t\r\n"


class Unfit(Exception):
    """The text is not what the grammar expects here."""


class Reader:
    """A buffer with primitives. Each ``yield`` asks for more text.

    Attributes:
        kept: when not None, everything that is read is kept here too, so that it can be given back as text.
    """

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._ended = False
        self.kept: list[str] | None = None

    def add(self, text: str) -> None:
        """More text."""
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self) -> None:
        """There is no more."""
        self._ended = True

    @property
    def exhausted(self) -> bool:
        """Everything is read and nothing comes."""
        return self._ended and self._at == len(self._text)

    def take(self, count: int) -> str:
        """Read so many characters that are there."""
        text = self._text[self._at : self._at + count]
        self._at += len(text)
        if self.kept is not None:
            self.kept.append(text)
        return text

    def peek(self) -> Reading[str]:
        """The next character without reading it; "" at the end."""
        while self._at == len(self._text) and not self._ended:
            yield
        return self._text[self._at : self._at + 1]

    def space(self) -> Reading[str]:
        """Read white space."""
        read = ""
        while (char := (yield from self.peek())) and char in _SPACE:
            read += self.take(1)
        return read

    def literal(self, text: str) -> Reading[bool]:
        """Read this text if it stands here."""
        while True:
            here = self._text[self._at : self._at + len(text)]
            if here == text:
                self.take(len(text))
                return True
            if self._ended or not text.startswith(here):
                return False
            yield

    def expect(self, text: str) -> Reading[None]:
        """Read this text, or raise Unfit."""
        if not (yield from self.literal(text)):
            raise Unfit

    def until(self, markers: Sequence[str], sink: Sink, *, keep: bool = False) -> Reading[str]:
        """Hand on text up to the first of the markers, and read that; "" when there is none before the end.

        Where several begin at the same place the longest counts.

        Args:
            keep: leave the marker unread.
        """
        while True:
            text = self._text
            found, marker = len(text), ""
            for one in markers:
                place = text.find(one, self._at)
                if place >= 0 and (place < found or (place == found and len(one) > len(marker))):
                    found, marker = place, one
            certain = len(text) if self._ended else self._may_begin(markers, found, marker)
            if marker and certain >= found + len(marker):
                self._hand(found, sink)
                if not keep:
                    self.take(len(marker))
                return marker
            self._hand(min(found, certain), sink)
            if self._ended:
                return ""
            yield

    def _hand(self, place: int, sink: Sink) -> None:
        if place > self._at:
            sink(self.take(place - self._at))

    def _may_begin(self, markers: Sequence[str], found: int, marker: str) -> int:
        """Where a marker may still begin at the end of the text, one that would go before the found one."""
        text = self._text
        longest = max(map(len, markers), default=0)
        for place in range(max(self._at, len(text) - longest + 1), len(text)):
            tail = text[place:]
            if any(len(tail) < len(one) and one.startswith(tail) for one in markers):
                if marker and place > found:
                    break
                return place
        return len(text)

    def json(self, sink: Sink) -> Reading[None]:
        """Hand on one JSON value as it comes; raises Unfit where there is none. Its inside is not judged."""
        first = yield from self.peek()
        if first == '"':
            yield from self._string(sink)
        elif first and first in "{[":
            yield from self._nested(sink)
        else:
            yield from self._scalar(sink)

    def _string(self, sink: Sink) -> Reading[None]:
        sink(self.take(1))
        while True:
            mark = yield from self.until(('"', "\\"), sink)
            if not mark:
                raise Unfit
            sink(mark)
            if mark == '"':
                return
            if not (yield from self.peek()):
                raise Unfit
            sink(self.take(1))

    def _nested(self, sink: Sink) -> Reading[None]:
        """An object or array: brackets must match, strings hide them."""
        stack: list[str] = []
        while True:
            mark = yield from self.until(('"', "{", "}", "[", "]"), sink, keep=True)
            if mark == '"':
                yield from self._string(sink)
                continue
            if mark in ("{", "["):
                stack.append("}" if mark == "{" else "]")
            elif not mark or mark != stack.pop():
                raise Unfit
            sink(self.take(1))
            if not stack:
                return

    def _scalar(self, sink: Sink) -> Reading[None]:
        read = ""
        while (char := (yield from self.peek())) and (char.isalnum() or char in "+-."):
            read += self.take(1)
        if not read:
            raise Unfit
        sink(read)

    def string(self) -> Reading[str]:
        """One JSON string, decoded; raises Unfit where there is none."""
        import json

        if (yield from self.peek()) != '"':
            raise Unfit
        pieces: list[str] = []
        yield from self._string(pieces.append)
        try:
            return str(json.loads("".join(pieces), strict=False))
        except ValueError as error:
            raise Unfit from error
