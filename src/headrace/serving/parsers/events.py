"""What a parser finds in a turn."""

from __future__ import annotations

import msgspec

__all__ = ["CallArguments", "CallEnd", "CallStart", "Content", "Event", "Thought"]


class Content(msgspec.Struct, frozen=True):
    """Text of the answer."""

    text: str


class Thought(msgspec.Struct, frozen=True):
    """Text of the thinking before it."""

    text: str


class CallStart(msgspec.Struct, frozen=True):
    """A call begins. ``id``: the format's own, if it has one."""

    name: str
    id: str = ""


class CallArguments(msgspec.Struct, frozen=True):
    """More of the newest call's arguments: JSON text."""

    text: str


class CallEnd(msgspec.Struct, frozen=True):
    """The newest call is over. ``broken``: before its arguments were whole."""

    broken: bool = False


Event = Content | Thought | CallStart | CallArguments | CallEnd
