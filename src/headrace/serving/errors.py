"""Every error that leaves over HTTP: one shape (OpenAI's), one table of kinds.

{"error": {"message": "...", "type": "invalid_request_error", "param": "top_p", "code": "invalid_value"}}
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

import msgspec
from aiohttp import web

from headrace.errors import (
    HeadraceError,
    InvalidRequest,
    NotFound,
    NotReady,
    Overloaded,
    PayloadTooLarge,
    RequestError,
    http_status,
    nearest,
)

__all__ = [
    "anthropic_body",
    "error_body",
    "error_event",
    "error_headers",
    "error_response",
    "from_http",
    "to_error",
]

log = logging.getLogger(__name__)

_ANTHROPIC = "/v1/messages"
# OpenAI's `type` by status; 500 and above are server errors.
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
}


class _Error(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class _Body(msgspec.Struct):
    error: _Error


_encode = msgspec.json.Encoder().encode


def error_body(error: HeadraceError) -> bytes:
    """JSON of an error."""
    status = http_status(error)
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return _encode(
        _Body(_Error(_clean(error.message), kind, error.param and _clean(error.param), error.code))
    )


def error_event(error: HeadraceError) -> bytes:
    """The same as a server-sent event, for streams that have begun."""
    return b"data: " + error_body(error) + b"\n\n"


def error_headers(error: HeadraceError) -> dict[str, str]:
    """Headers that go with an error: when to come again, and how to authenticate."""
    status = http_status(error)
    if isinstance(error, Overloaded):
        wait = max(0.001, error.retry_after)
        return {"Retry-After": str(math.ceil(wait)), "Retry-After-Ms": str(math.ceil(wait * 1000))}
    if isinstance(error, NotReady):
        return {"Retry-After": "1"}
    return {"WWW-Authenticate": "Bearer"} if status == 401 else {}


def anthropic_body(error: HeadraceError, event: bool = False) -> bytes:
    """JSON of an error in Anthropic's shape; as a server-sent event of a stream that has begun."""
    status = http_status(error)
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    data = _encode({"type": "error", "error": {"type": kind, "message": _clean(error.message)}})
    return b"event: error\ndata: " + data + b"\n\n" if event else data


def error_response(error: HeadraceError, status: int | None = None, *, path: str = "") -> web.Response:
    """The reply for an error, in the shape of the API that ``path`` belongs to."""
    return web.Response(
        status=status or http_status(error),
        body=anthropic_body(error) if path.startswith(_ANTHROPIC) else error_body(error),
        content_type="application/json",
        headers=error_headers(error),
    )


def to_error(error: Exception) -> HeadraceError:
    """Ours as it is; anything foreign is a bug: logged in full, told in general terms."""
    if isinstance(error, HeadraceError):
        return error
    log.error("unexpected %s while answering a request", type(error).__name__, exc_info=error)
    return HeadraceError(
        f"internal error ({type(error).__name__}); the server's log has the details", code="internal_error"
    )


def from_http(error: web.HTTPException, path: str, method: str, routes: Iterable[str]) -> HeadraceError:
    """What aiohttp refused, in our words."""
    if isinstance(error, web.HTTPNotFound):
        return NotFound(f"no route {path!r}{nearest(path, routes)}", code="unknown_url")
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return InvalidRequest(f"{path} takes {allowed}, not {method}", code="method_not_allowed")
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return PayloadTooLarge(error.text or "the body is too large")
    return RequestError(error.text or error.reason, code=f"http_{error.status}")


def _clean(text: str) -> str:
    """Messages quote what clients sent, which may hold lone surrogates that no JSON can carry."""
    return text.encode("utf-8", "backslashreplace").decode()
