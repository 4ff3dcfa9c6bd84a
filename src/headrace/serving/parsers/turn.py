"""One choice's turn as it grows: content, thoughts and calls."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field

from headrace.serving.parsers.events import CallArguments, CallEnd, CallStart, Content, Event, Thought
from headrace.serving.parsers.machine import Machine

__all__ = ["Call", "Turn"]


@dataclass(slots=True)
class Call:
    """A tool call. ``whole``: its arguments are complete JSON."""

    id: str
    name: str
    pieces: list[str] = field(default_factory=list)
    whole: bool = False

    @property
    def arguments(self) -> str:
        return "".join(self.pieces)


class Turn:
    """Feeds a machine and keeps what it finds; without one all text is content.

    Args:
        short_ids: ids of nine characters, as Mistral's templates ask.
        parallel: keep more than one call.

    Attributes:
        calls: the calls so far.
        dropped: how many calls were left out.
    """

    def __init__(self, machine: Machine | None, *, short_ids: bool = False, parallel: bool = True) -> None:
        self._machine = machine
        self._short = short_ids
        self._content: list[str] = []
        self._thoughts: list[str] = []
        self._parallel = parallel
        self.calls: list[Call] = []
        self.dropped = 0

    @property
    def content(self) -> str:
        return "".join(self._content)

    @property
    def thoughts(self) -> str:
        return "".join(self._thoughts)

    def feed(self, text: str, last: bool = False) -> list[Event]:
        """Events of more text; with ``last`` all that was held back too."""
        if self._machine is None:
            events: list[Event] = [Content(text)] if text else []
        else:
            events = self._machine.feed(text)
            if last:
                events += self._machine.finish()
        return [event for event in events if self._keep(event)]

    def _keep(self, event: Event) -> bool:
        """Take an event in; False when it belongs to a call too many."""
        if isinstance(event, CallStart) and self.calls and not self._parallel:
            self.dropped += 1
        if self.dropped and isinstance(event, (CallStart, CallArguments, CallEnd)):
            return False
        match event:
            case Content(text):
                self._content.append(text)
            case Thought(text):
                self._thoughts.append(text)
            case CallStart(name, identity):
                self.calls.append(Call(identity or self._new_id(), name))
            case CallArguments(text):
                self.calls[-1].pieces.append(text)
            case CallEnd(broken):
                call = self.calls[-1]
                call.whole = not broken and _is_object(call.arguments)
        return True

    def _new_id(self) -> str:
        return uuid.uuid4().hex[:9] if self._short else f"call_{uuid.uuid4().hex[:24]}"


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
