"""The one exception tree, and the one table that maps it to HTTP status codes.

HeadraceError
  ├── RequestError                  the caller can fix it
  │     ├── InvalidRequest          400  a field is wrong; `param` names it
  │     │     └── ContextLengthExceeded
  │     ├── AuthenticationFailed    401
  │     ├── PermissionDenied        403
  │     ├── NotFound                404  model, route or stored object
  │     ├── PayloadTooLarge         413
  │     ├── Unprocessable           422  well-formed, yet this model cannot do it
  │     ├── Overloaded              429  queue full; `retry_after` in seconds
  │     └── RequestTimeout          408
  ├── EngineError                   500  a bug or a device fault; this request failed
  │     ├── EngineDead              503  the engine process is gone
  │     └── NotReady                503  starting or draining
  ├── ConfigError                   all problems of a configuration, together
  └── ModelError                    the checkpoint cannot be served
        ├── UnknownArchitecture
        ├── UnsupportedCheckpoint
        ├── MissingFile
        └── DoesNotFit
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "HTTP_STATUS",
    "AuthenticationFailed",
    "ConfigError",
    "ContextLengthExceeded",
    "DoesNotFit",
    "EngineDead",
    "EngineError",
    "HeadraceError",
    "InvalidRequest",
    "MissingFile",
    "ModelError",
    "NotFound",
    "NotReady",
    "Overloaded",
    "PayloadTooLarge",
    "PermissionDenied",
    "RequestError",
    "RequestTimeout",
    "UnknownArchitecture",
    "Unprocessable",
    "UnsupportedCheckpoint",
    "from_code",
    "http_status",
    "nearest",
]


class HeadraceError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: what was wrong, the value, what was expected and the way out.
        param: the request field or configuration key at fault, as the user wrote it.
        code: a stable machine-readable name; defaults to the class's own.
    """

    code = "error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class RequestError(HeadraceError):
    """The caller's request is at fault."""

    code = "invalid_request"


class InvalidRequest(RequestError):
    """A field has a wrong type, range or combination."""

    code = "invalid_value"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and requested output do not fit the model's context."""

    code = "context_length_exceeded"


class AuthenticationFailed(RequestError):
    """No API key, or a wrong one."""

    code = "invalid_api_key"


class PermissionDenied(RequestError):
    """The key is known but may not do this."""

    code = "permission_denied"


class NotFound(RequestError):
    """No such model, route or object."""

    code = "not_found"


class PayloadTooLarge(RequestError):
    """The body or the number of inputs is over the limit."""

    code = "payload_too_large"


class Unprocessable(RequestError):
    """Well-formed, but not for this model (for instance an input over its length)."""

    code = "unprocessable"


class Overloaded(RequestError):
    """The bounded queue is full.

    Args:
        retry_after: seconds after which a retry is sensible.
    """

    code = "overloaded"

    def __init__(self, message: str, *, retry_after: float = 1.0, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.retry_after = retry_after


class RequestTimeout(RequestError):
    """The request's own deadline passed."""

    code = "timeout"


class EngineError(HeadraceError):
    """The engine failed this request."""

    code = "internal_error"


class EngineDead(EngineError):
    """The engine process is gone; the message says why."""

    code = "engine_dead"


class NotReady(EngineError):
    """The server is starting or draining."""

    code = "not_ready"


class ConfigError(HeadraceError):
    """A configuration is wrong.

    Args:
        problems: every problem found, each a full sentence with the key's path.
    """

    code = "config_error"

    def __init__(self, problems: str | Sequence[str], *, param: str | None = None) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems), param=param)


class ModelError(HeadraceError):
    """The checkpoint cannot be served."""

    code = "model_error"


class UnknownArchitecture(ModelError):
    """`config.json` names an architecture that no family declares."""

    code = "unknown_architecture"


class UnsupportedCheckpoint(ModelError):
    """A known architecture in a form that is not supported."""

    code = "unsupported_checkpoint"


class MissingFile(ModelError):
    """A file that the checkpoint must hold is not there."""

    code = "missing_file"


class DoesNotFit(ModelError):
    """Weights, cache and activations are larger than the memory."""

    code = "does_not_fit"


HTTP_STATUS: dict[type[HeadraceError], int] = {
    InvalidRequest: 400,
    AuthenticationFailed: 401,
    PermissionDenied: 403,
    NotFound: 404,
    RequestTimeout: 408,
    PayloadTooLarge: 413,
    Unprocessable: 422,
    Overloaded: 429,
    RequestError: 400,
    EngineDead: 503,
    NotReady: 503,
    EngineError: 500,
    ConfigError: 400,
    ModelError: 400,
    HeadraceError: 500,
}


def http_status(error: BaseException) -> int:
    """Status code of the nearest class in the table; 500 for anything foreign."""
    for cls in type(error).__mro__:
        if cls in HTTP_STATUS:
            return HTTP_STATUS[cls]
    return 500


def from_code(
    code: str, message: str, param: str | None = None, default: type[HeadraceError] = EngineError
) -> HeadraceError:
    """The exception whose class has this code, for errors that crossed a process border as text."""
    classes: list[type[HeadraceError]] = [HeadraceError]
    for cls in classes:  # grows while it is read: the whole tree
        classes += cls.__subclasses__()
    # Only those declared here cross the border: others inherit their codes and may be made of other arguments.
    # Of those that share a code the first is the one that declares it.
    found = {cls.code: cls for cls in reversed(classes) if cls.__module__ == __name__}.get(code, default)
    return found(message, param=param)


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """A hint such as ``"; did you mean 'top_k'?"``, or ``""`` when nothing is near."""
    close = difflib.get_close_matches(name, list(known), n=count, cutoff=0.55)
    return f"; did you mean {' or '.join(repr(match) for match in close)}?" if close else ""
