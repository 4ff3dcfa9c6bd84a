"""Around every handler: request id, keys, errors in one shape, one log line, one count."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable

from aiohttp import web

from headrace.errors import NotReady
from headrace.serving.errors import error_response, from_http, to_error
from headrace.serving.exchange import Exchange, begin
from headrace.serving.state import STATE, State

__all__ = ["ROUTES", "around"]

log = logging.getLogger("headrace.serving.requests")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_ID = re.compile(r"[\x21-\x7e]{1,128}")
_OPEN = frozenset({"/health", "/ping", "/ready", "/version", "/docs", "/openapi.json"})
_QUIET = _OPEN | {"/metrics"}
CLIENT_GONE = 499
ROUTES: web.AppKey[frozenset[str]] = web.AppKey("routes", frozenset)


@web.middleware
async def around(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer, whatever happens; a client that left is logged as 499."""
    state = request.app[STATE]
    given = request.headers.get("x-request-id", "")
    exchange = Exchange(given if _ID.fullmatch(given) else uuid.uuid4().hex)
    begin(exchange)
    task = asyncio.current_task()
    assert task is not None
    if request.path not in _QUIET:
        state.running.add(task)
    start = time.perf_counter()
    status = CLIENT_GONE
    try:
        response = await _answer(request, handler, state)
        status = response.status
        if not response.prepared:
            response.headers.update(exchange.headers())
            if state.draining:
                response.force_close()
        return response
    finally:
        state.running.discard(task)
        _finish(request, state, exchange, status, time.perf_counter() - start)


async def _answer(request: web.Request, handler: Handler, state: State) -> web.StreamResponse:
    try:
        if request.path not in _OPEN:
            state.keys.check(request)
        if state.draining and request.path not in _QUIET:
            raise NotReady("the server is shutting down and takes no more requests")
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        routes = request.app[ROUTES]
        reply = error_response(
            from_http(error, request.path, request.method, routes), error.status, path=request.path
        )
        if "Allow" in error.headers:
            reply.headers["Allow"] = error.headers["Allow"]
        return reply
    except Exception as error:
        return error_response(to_error(error), path=request.path)


def _finish(request: web.Request, state: State, exchange: Exchange, status: int, seconds: float) -> None:
    resource = request.match_info.route.resource
    route = resource.canonical if resource is not None else "unknown"
    if exchange.forwarded:  # the process that answered has counted it
        return
    state.metrics.count_response(route, status)
    if request.path in _QUIET:
        return
    fields: dict[str, object] = {
        "request_id": exchange.request_id,
        "method": request.method,
        "route": route,
        "status": status,
        "seconds": round(seconds, 6),
    }
    record = exchange.record
    if record is not None:
        fields |= {
            "model": exchange.model,
            "outcome": record.outcome or "stop",
            "prompt_tokens": record.usage.prompt_tokens,
            "cached_tokens": record.usage.cached_tokens,
            "completion_tokens": record.usage.completion_tokens,
            "ttft_seconds": None if record.ttft is None else round(record.ttft, 6),
        }
    if exchange.prompt is not None:
        fields["prompt"] = exchange.prompt
    log.info("request", extra={"fields": fields})
