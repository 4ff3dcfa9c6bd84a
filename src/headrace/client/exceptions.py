"""What the client raises.

``HTTPError`` and ``Timeout`` are also ``requests.exceptions.HTTPError`` and ``Timeout`` where requests is
installed, because programs written for the hosted client catch those. Everything else is also a
``ValueError`` for the same reason. requests is imported when the first of the two classes is asked for.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import msgspec

from headrace.errors import HeadraceError, InvalidRequest

__all__ = [
    "BadReply",
    "Cancelled",
    "ConnectionFailed",
    "ErrorResponse",
    "HTTPError",
    "InvalidArgument",
    "Timeout",
    "reason",
]


class InvalidArgument(InvalidRequest, ValueError):
    """An argument has a wrong value; nothing was sent."""


class Cancelled(HeadraceError, ValueError):
    """The operation's ``CancellationToken`` was cancelled; its connections are closed."""

    code = "cancelled"


class BadReply(HeadraceError, ValueError):
    """The server answered 2xx with something that is not an answer to the request."""

    code = "bad_reply"


class ConnectionFailed(HeadraceError, ValueError):
    """No whole HTTP reply came back.

    Attributes:
        connecting: the connection could not be made (so nothing was sent).
        stale: a kept connection was closed by the server before it answered a byte.
    """

    code = "connection_failed"

    def __init__(self, message: str, *, connecting: bool = False, stale: bool = False) -> None:
        super().__init__(message)
        self.connecting = connecting
        self.stale = stale


def reason(status: int) -> str:
    """``Service Unavailable`` for 503; empty for a code that the standard does not name."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


class ErrorResponse:
    """The reply behind an ``HTTPError``, with the attributes of ``requests.Response`` that people read."""

    ok = False

    def __init__(self, status: int, headers: dict[str, str], content: bytes, url: str) -> None:
        self.status_code = status
        self.headers = headers
        self.content = content
        self.url = url
        self.reason = reason(status)

    @property
    def text(self) -> str:
        return self.content.decode("utf-8", "replace")

    @property
    def args(self) -> tuple[int, str]:
        """What the hosted client's documentation reads: ``error.response.args[0]``."""
        return self.status_code, self.text

    def json(self) -> Any:
        """Raises ValueError when the body is not JSON."""
        try:
            return msgspec.json.decode(self.content)
        except msgspec.DecodeError as error:
            raise ValueError(f"the error body is not JSON: {error}") from None

    def raise_for_status(self) -> None:
        raise HTTPError(self)

    def __repr__(self) -> str:
        return f"<ErrorResponse [{self.status_code}]>"


if TYPE_CHECKING:

    class HTTPError(HeadraceError, OSError):
        """The server refused, and retries did not help. ``args == (status, text)``."""

        response: ErrorResponse
        status: int

        def __init__(self, response: ErrorResponse) -> None: ...

    class Timeout(HeadraceError, OSError):
        """Time ran out. ``args == (408, text)``; ``where`` is ``local`` (the whole operation's limit, nothing
        asked of the server) or ``remote`` (one request was not answered in time)."""

        where: str

        def __init__(self, text: str, where: str) -> None: ...


def _build() -> None:
    try:
        from requests import exceptions as base

        http_base: Any = base.HTTPError
        timeout_base: Any = base.Timeout
    except ImportError:
        http_base = timeout_base = OSError

    class HTTPError(HeadraceError, http_base):
        """The server refused, and retries did not help. ``args == (status, text)``."""

        code = "http_error"

        def __new__(cls, response: ErrorResponse) -> Any:
            return OSError.__new__(cls, response.status_code, cls._text(response))

        def __init__(self, response: ErrorResponse) -> None:
            text = self._text(response)
            OSError.__init__(self, response.status_code, text)
            self.message, self.param = text, None
            self.response, self.request = response, None
            self.status = response.status_code

        @staticmethod
        def _text(response: ErrorResponse) -> str:
            status = f"{response.status_code} {response.reason}".strip()
            return f"API request failed with status {status}: {response.text}"

        def __reduce__(self) -> Any:
            return _restore, ("HTTPError", self.response)

    class Timeout(HeadraceError, timeout_base):
        """Time ran out. ``args == (408, text)``; ``where`` is ``local`` or ``remote``."""

        code = "timeout"

        def __new__(cls, text: str, where: str) -> Any:
            return OSError.__new__(cls, 408, text, where)

        def __init__(self, text: str, where: str) -> None:
            OSError.__init__(self, 408, text, where)
            self.message, self.param, self.where = text, None, where
            self.response = self.request = None

        def __reduce__(self) -> Any:
            return _restore, ("Timeout", self.message, self.where)

    for cls in (HTTPError, Timeout):
        cls.__module__, cls.__qualname__ = __name__, cls.__name__
        globals()[cls.__name__] = cls


def _restore(name: str, *args: Any) -> Any:
    return __getattr__(name)(*args)


def __getattr__(name: str) -> Any:
    if name in ("HTTPError", "Timeout"):
        if name not in globals():
            _build()
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
