"""How to process one operation: limits, retries, hedging, cancellation."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from headrace.client.exceptions import InvalidArgument

__all__ = ["CancellationToken", "RequestProcessingPreference", "TraceContext", "check_headers"]

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_MIN_HEDGE_S = 0.045


class CancellationToken:
    """Cancels every operation that was given it, from any thread. It cannot be un-cancelled."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancelled = False
        self._callbacks: set[Callable[[], object]] = set()

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            callbacks, self._callbacks = self._callbacks, set()
        for callback in callbacks:
            callback()

    def is_cancelled(self) -> bool:
        return self._cancelled

    def _subscribe(self, callback: Callable[[], object]) -> None:
        """Call back once on ``cancel``; at once if that has been."""
        with self._lock:
            if not self._cancelled:
                self._callbacks.add(callback)
                return
        callback()

    def _unsubscribe(self, callback: Callable[[], object]) -> None:
        with self._lock:
            self._callbacks.discard(callback)


class TraceContext:
    """A W3C trace context to send with every request (https://www.w3.org/TR/trace-context/)."""

    def __init__(self, traceparent: str, tracestate: str | None = None) -> None:
        self.traceparent = traceparent
        self.tracestate = tracestate


class RequestProcessingPreference:
    """Limits and policies of one operation. ``None`` takes the default; values are checked when used.

    Args:
        max_concurrent_requests: requests in flight at most, 1 to 1024; at most 512 when ``batch_size`` < 16.
        batch_size: items in one request at most, 1 to 1024.
        timeout_s: seconds for one attempt of one request, 0.1 to 3600.
        max_chars_per_request: characters of text in one request at most, 50 to 1,048,576; a longer text
            travels alone.
        pin_initial_endpoint_once: send all first attempts of an operation to one endpoint of the pool.
        hedge_delay: seconds after which a copy of an unanswered request races it; None: never.
        total_timeout_s: seconds for the whole operation; None: no limit.
        hedge_budget_pct: copies at most: 1 + this share of the operation's requests, rounded up; 0: none.
        retry_budget_pct: retries after network faults at most: the larger of 2 and 1 + this share, rounded
            up, beside a free one for each request whose first attempt meets such a fault.
        max_retries: retries of one request at most, 0 to 6.
        initial_backoff_ms: wait before the first retry, 50 to 45000; the next waits are each 4 times longer,
            up to 45 s, plus 0 to 99 ms.
        cancel_token: cancels the operation.
        primary_api_key_override: used instead of the client's key.
        extra_headers: sent with every request; they replace the client's own of the same name.
        non_retryable_status_codes: never retried.
        trace_context: sent with every request.
    """

    def __init__(
        self,
        max_concurrent_requests: int | None = None,
        batch_size: int | None = None,
        timeout_s: float | None = None,
        max_chars_per_request: int | None = None,
        pin_initial_endpoint_once: bool | None = None,
        hedge_delay: float | None = None,
        total_timeout_s: float | None = None,
        hedge_budget_pct: float | None = None,
        retry_budget_pct: float | None = None,
        max_retries: int | None = None,
        initial_backoff_ms: int | None = None,
        cancel_token: CancellationToken | None = None,
        primary_api_key_override: str | None = None,
        extra_headers: Mapping[str, str] | None = None,
        non_retryable_status_codes: Iterable[int] | None = None,
        trace_context: TraceContext | None = None,
    ) -> None:
        self.max_concurrent_requests = _or(max_concurrent_requests, 256)
        self.batch_size = _or(batch_size, 8)
        self.timeout_s = _or(timeout_s, 3600.0)
        self.max_chars_per_request: int | None = _or(max_chars_per_request, 8000)
        self.pin_initial_endpoint_once = bool(pin_initial_endpoint_once)
        self.hedge_delay = hedge_delay
        self.total_timeout_s = total_timeout_s
        self.hedge_budget_pct = _or(hedge_budget_pct, 0.10)
        self.retry_budget_pct = _or(retry_budget_pct, 0.05)
        self.max_retries = _or(max_retries, 5)
        self.initial_backoff_ms = _or(initial_backoff_ms, 125)
        self.cancel_token = cancel_token
        self.primary_api_key_override = primary_api_key_override
        self.extra_headers = None if extra_headers is None else dict(extra_headers)
        self.non_retryable_status_codes = set(non_retryable_status_codes or ())
        self.trace_context = trace_context

    @classmethod
    def default(cls) -> RequestProcessingPreference:
        """All defaults."""
        return cls()

    def __repr__(self) -> str:
        hidden = ("primary_api_key_override", "extra_headers")  # may hold secrets
        shown = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if k not in hidden)
        return f"RequestProcessingPreference({shown})"

    def check(self) -> None:
        """Raises InvalidArgument for the first field out of range, TypeError for one of the wrong type."""
        _whole("max_concurrent_requests", self.max_concurrent_requests, 1, 1024)
        _whole("batch_size", self.batch_size, 1, 1024)
        if self.max_concurrent_requests > 512 and self.batch_size < 16:
            raise InvalidArgument(
                f"max_concurrent_requests is {self.max_concurrent_requests} with batch_size {self.batch_size}"
                "; it must be at most 512 unless batch_size is at least 16",
                param="max_concurrent_requests",
            )
        if self.max_chars_per_request is not None:
            _whole("max_chars_per_request", self.max_chars_per_request, 50, 1_048_576)
        _within("timeout_s", self.timeout_s, 0.1, 3600.0)
        if self.hedge_delay is not None:
            _within("hedge_delay", self.hedge_delay, _MIN_HEDGE_S, 3600.0)
            if self.hedge_delay >= self.timeout_s - _MIN_HEDGE_S:
                raise InvalidArgument(
                    f"hedge_delay is {self.hedge_delay:g} s; expected less than timeout_s - {_MIN_HEDGE_S} s "
                    f"({self.timeout_s - _MIN_HEDGE_S:g} s)",
                    param="hedge_delay",
                )
        if self.total_timeout_s is not None:
            _within("total_timeout_s", self.total_timeout_s, self.timeout_s, float("inf"))
        _within("hedge_budget_pct", self.hedge_budget_pct, 0.0, 3.0)
        _within("retry_budget_pct", self.retry_budget_pct, 0.0, 3.0)
        _whole("max_retries", self.max_retries, 0, 6)
        _whole("initial_backoff_ms", self.initial_backoff_ms, 50, 45_000)
        if self.primary_api_key_override == "":
            raise InvalidArgument("primary_api_key_override is empty; give a key or None")
        check_headers("extra_headers", self.extra_headers or {})


def check_headers(name: str, headers: Mapping[str, str]) -> None:
    """Refuse what would break the framing of a request (RFC 9110, 5.1 and 5.5)."""
    for key, value in headers.items():
        if not isinstance(key, str) or not _TOKEN.fullmatch(key):
            raise InvalidArgument(f"{name} holds {key!r}, which is not an HTTP header name", param=name)
        if not isinstance(value, str) or any(c in value for c in "\r\n\0"):
            raise InvalidArgument(f"{name}[{key!r}] is not a string without line breaks", param=name)
        if key.lower() in ("content-length", "transfer-encoding", "host", "connection"):
            raise InvalidArgument(f"{name} may not set {key}; the client does", param=name)


T = TypeVar("T")


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _whole(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; expected an integer")
    _within(name, value, low, high)


def _within(name: str, value: float, low: float, high: float) -> None:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; expected a number")
    if not low <= value <= high:  # also refuses NaN
        raise InvalidArgument(f"{name} is {value:g}; expected {low:g} to {high:g}", param=name)
