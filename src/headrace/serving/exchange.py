"""What is known of the HTTP exchange that the current task answers: for logs, and for headers of streams."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from headrace.serving.metrics import Record

__all__ = ["Exchange", "begin", "current"]


@dataclass(slots=True)
class Exchange:
    """Attributes:
    prompt: set only where the server is told to log prompts.
    """

    request_id: str
    model: str = ""
    record: Record | None = None
    prompt: Any = None


_current: ContextVar[Exchange] = ContextVar("headrace_exchange")


def begin(exchange: Exchange) -> None:
    """Make it the current task's."""
    _current.set(exchange)


def current() -> Exchange:
    """The exchange of the task that calls this."""
    return _current.get()
