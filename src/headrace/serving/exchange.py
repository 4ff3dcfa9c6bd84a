"""What is known of the HTTP exchange that the current task answers: for logs, and for headers of streams."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from headrace.serving.metrics import Record

__all__ = ["Exchange", "begin", "current"]

_HEADER = 2000  # longest warning header, bytes


@dataclass(slots=True)
class Exchange:
    """Attributes:
    prompt: set only where the server is told to log prompts.
    forwarded: another process of this server answered.
    warnings: what the request asked for and does not get; told in the header x-headrace-warnings.
    """

    request_id: str
    model: str = ""
    record: Record | None = None
    prompt: Any = None
    warnings: tuple[str, ...] = ()
    forwarded: bool = False

    def headers(self) -> dict[str, str]:
        """Headers of the reply, streamed or not."""
        headers = {"x-request-id": self.request_id}
        if self.warnings:
            text = " | ".join(self.warnings).encode("ascii", "backslashreplace").decode()
            # A header holds printable ASCII only, and the text may quote the client's own names.
            printable = "".join(c if " " <= c <= "~" else "?" for c in " ".join(text.split()))
            headers["x-headrace-warnings"] = printable[:_HEADER]
        return headers


_current: ContextVar[Exchange] = ContextVar("headrace_exchange")


def begin(exchange: Exchange) -> None:
    """Make it the current task's."""
    _current.set(exchange)


def current() -> Exchange:
    """The exchange of the task that calls this."""
    return _current.get()
