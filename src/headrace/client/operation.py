"""One operation: many requests under one preference, with retries, hedging, deadlines and cancellation.

Everything here runs on the background loop.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

import msgspec

from headrace.client.endpoints import Endpoint, EndpointPool
from headrace.client.exceptions import Cancelled, ConnectionFailed, ErrorResponse, InvalidArgument
from headrace.client.expiry import Expiry, TimedOut
from headrace.client.flow import Flow
from headrace.client.http1 import Reply
from headrace.client.limiter import AdaptiveLimit
from headrace.client.logs import log
from headrace.client.preference import RequestProcessingPreference
from headrace.client.redirects import SECRETS, Hop, follow
from headrace.client.transport import HttpClientWrapper, Origin, split_url

__all__ = ["Job", "Operation", "StreamSink", "Target"]

R = TypeVar("R")

_RETRYABLE = {408, 409, 429}
_MAX_BACKOFF_S = 45.0
_CONNECT_RETRIES = 2


class StreamSink(Protocol):
    """Takes a streamed body; a new one for each attempt."""

    complete: bool

    def feed(self, data: bytes) -> None: ...


class Job(msgspec.Struct):
    """One request. ``items`` of the caller's inputs from ``offset`` on travel in it."""

    index: int
    path: str
    body: bytes | None
    offset: int = 0
    items: int = 1
    method: str = "POST"
    sink: Callable[[], StreamSink] | None = None


class Target(msgspec.Struct, frozen=True):
    """Where a client's requests go: one base URL or a pool."""

    base_url: str
    wrapper: HttpClientWrapper
    api_key: str
    pool: EndpointPool | None = None


class _Budget:
    """At most ``max(floor, 1 + ceil(share x requests))``; with ``total`` unknown, of the requests so far."""

    def __init__(self, share: float, floor: int, total: int | None) -> None:
        self.share, self.floor, self.total = share, floor, total
        self.spent = 0

    def take(self, started: int) -> bool:
        requests = started if self.total is None else self.total
        limit = max(self.floor, 1 + math.ceil(requests * self.share)) if self.share or self.floor else 0
        if self.spent >= limit:
            return False
        self.spent += 1
        return True


class Operation:
    """Sends jobs to a target.

    Args:
        total: how many jobs there will be, if known; the budgets are shares of it.
        headers: beside those of the preference.
        limit: adapts the number of requests in flight to the server; a 429 then waits without counting as a
            retry, for ``timeout_s`` at most.
    """

    def __init__(
        self,
        target: Target,
        preference: RequestProcessingPreference,
        total: int | None = None,
        headers: dict[str, str] | None = None,
        limit: AdaptiveLimit | None = None,
    ) -> None:
        preference.check()
        self._limit = limit
        self.preference = preference
        self.target = target
        self.wrapper = target.wrapper
        prefix = os.environ.get("PERFORMANCE_CLIENT_REQUEST_ID_PREFIX") or "perfclient"
        self.request_id = f"{prefix}-{os.urandom(5).hex()}"
        self._id = self.request_id.encode("latin-1")
        self._headers = self._common_headers(headers or {})
        self._lanes: dict[tuple[str, str, str], tuple[Origin, bytes]] = {}
        self._hedges = _Budget(preference.hedge_budget_pct, 0, total)
        self._retries = _Budget(preference.retry_budget_pct, 2, total)
        self._started = 0
        self._hedged = preference.hedge_delay is not None
        self._expiry = Expiry()
        self._deadline: float | None = None
        self._pinned: Endpoint | None = None
        if target.pool is not None:
            target.pool.watch()
            if preference.pin_initial_endpoint_once:
                self._pinned = target.pool.pick()

    # -- many -----------------------------------------------------------------------------------------

    async def stream(
        self,
        jobs: Iterable[Job],
        parse: Callable[[Job, Reply], R],
        *,
        width: int,
        ahead: int | None = None,
        in_thread: bool = False,
        on_error: Callable[[Job, Exception], R] | None = None,
    ) -> AsyncGenerator[R, None]:
        """Parsed replies in the order of the jobs, whose ``index`` counts from 0.

        Args:
            width: requests in flight at most.
            ahead: finished and running jobs before the one that is waited for, at most; None: no limit.
            in_thread: take jobs from the iterator in a thread.
            on_error: makes a result of a job's failure, which then ends nothing.

        Raises: the first failure of any job, at once; then nothing is left running.
        """
        flow = Flow(jobs, self._worker(parse), ahead=ahead, in_thread=in_thread, on_error=on_error)
        async with self._bounded(flow):
            async for result in flow.run(width):
                yield result

    async def each(
        self,
        jobs: Iterable[Job],
        take: Callable[[Job, Reply], object],
        *,
        width: int,
        in_thread: bool = False,
        on_error: Callable[[Job, Exception], object] | None = None,
    ) -> None:
        """``take`` every reply, in the order of arrival. Arguments and errors are those of ``stream``."""
        flow = Flow(jobs, self._worker(take), in_thread=in_thread, on_error=on_error)
        async with self._bounded(flow):
            await flow.drain(width)

    def _worker(self, parse: Callable[[Job, Reply], R]) -> Callable[[Job], Awaitable[R]]:
        limit = self._limit
        if limit is None:
            return partial(self.send, parse)

        async def admitted(job: Job) -> R:
            async with limit:
                return await self.send(parse, job)

        return admitted

    @asynccontextmanager
    async def _bounded(self, flow: Flow[Job, Any]) -> AsyncIterator[None]:
        """A flow under the preference's token and total time limit; it has ended afterwards."""
        loop = asyncio.get_running_loop()
        token, total_s = self.preference.cancel_token, self.preference.total_timeout_s
        if token is not None and token.is_cancelled():
            raise Cancelled("the operation's token was cancelled before it began")

        def on_cancel() -> None:
            loop.call_soon_threadsafe(flow.fail, Cancelled("the operation was cancelled by its token"))

        def on_timeout() -> None:
            from headrace.client.exceptions import Timeout

            flow.fail(Timeout(f"Local timeout: the whole operation was not done in {total_s:g} s", "local"))

        timer = None
        if total_s is not None:
            self._deadline = loop.time() + total_s
            timer = loop.call_at(self._deadline, on_timeout)
        if token is not None:
            token._subscribe(on_cancel)
        try:
            yield
        finally:
            await flow.close()
            self._expiry.close()
            if timer is not None:
                timer.cancel()
            if token is not None:
                token._unsubscribe(on_cancel)

    # -- one ------------------------------------------------------------------------------------------

    async def send(self, parse: Callable[[Job, Reply], R], job: Job) -> R:
        """One job to its parsed 2xx reply, through retries. Raises HTTPError, Timeout, ConnectionFailed."""
        preference = self.preference
        begun = time.perf_counter()
        self._started += 1
        backoff = preference.initial_backoff_ms / 1000.0
        retries = connect_retries = 0
        stale = False
        endpoint: Endpoint | None = None

        def ready(reply: Reply) -> None:
            reply.seconds = time.perf_counter() - begun
            reply.value = parse(job, reply)

        while True:
            reply: Reply | None = None
            fault: ConnectionFailed | TimedOut | None = None
            endpoint = self._choose(endpoint)
            try:
                if not self._hedged and job.sink is None:
                    reply = await self._attempt(job, endpoint, retries, ready)
                else:  # which of two racers is parsed, or whether a stream is whole, is known afterwards
                    run = self._attempt if job.sink is not None else self._race
                    reply = await run(job, endpoint, retries)
                    if reply.ok:
                        ready(reply)
                if reply.ok:
                    value: R = reply.value
                    reply.value = None  # it may hold the reply: a cycle would live until the next collection
                    return value
                again = self._retryable(reply.status)
                patient = self._limit is not None and reply.status == 429 and again
                if patient and time.perf_counter() - begun < preference.timeout_s:
                    await asyncio.sleep(_pause(backoff, reply))
                    backoff = min(backoff * 2, _MAX_BACKOFF_S)
                    continue
            except ConnectionFailed as error:
                if error.stale and not stale:
                    stale = True  # an idle connection died under us: not the server's answer to this request
                    continue
                fault = error
                connect_retries += error.connecting
                again = connect_retries <= _CONNECT_RETRIES and (
                    retries == 0 or self._retries.take(self._started)
                )
            except TimedOut as error:
                fault = error
                again = self._retries.take(self._started)
            if not again or retries >= preference.max_retries:
                raise self._verdict(job, reply, fault, retries)
            why = repr(fault) if reply is None else f"status {reply.status}"
            told = (self.request_id, job.index, retries + 1, preference.max_retries, why)
            log.debug("request %s-%d: retry %d of %d after %s", *told)
            await asyncio.sleep(_pause(backoff, reply))
            backoff = min(backoff * 4, _MAX_BACKOFF_S)
            retries += 1

    def _retryable(self, status: int) -> bool:
        if status in self.preference.non_retryable_status_codes:
            return False
        return status in _RETRYABLE or 500 <= status < 600

    def _verdict(
        self, job: Job, reply: Reply | None, fault: BaseException | None, retries: int
    ) -> BaseException:
        tries = f"after {retries + 1} attempts" if retries else "at the first attempt"
        if reply is not None:
            from headrace.client.exceptions import HTTPError

            url = self.target.base_url + job.path
            return HTTPError(ErrorResponse(reply.status, reply.headers, reply.body, url))
        if isinstance(fault, TimedOut):
            from headrace.client.exceptions import Timeout

            limit = f"{self.preference.timeout_s:g} s"
            text = f"Remote timeout: no reply within {limit} ({tries}); request {self.request_id}-{job.index}"
            return Timeout(text, "remote")
        assert isinstance(fault, ConnectionFailed)
        return ConnectionFailed(
            f"{fault} ({tries}); request {self.request_id}-{job.index}", connecting=fault.connecting
        )

    async def _race(self, job: Job, first: Endpoint | None, retry: int) -> Reply:
        """One attempt; after ``hedge_delay`` a copy races it. A failed racer leaves the race to the other."""
        racers = [asyncio.ensure_future(self._attempt(job, first, retry))]
        try:
            await asyncio.wait(racers, timeout=self.preference.hedge_delay)
            if not racers[0].done() and self._hedges.take(self._started):
                log.info("request %s-%d: a second copy is sent", self.request_id, job.index)
                other = self.target.pool.pick(avoid=first) if self.target.pool else None
                racers.append(asyncio.ensure_future(self._attempt(job, other, retry)))
            pending = set(racers)
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for racer in done:
                    if racer.exception() is None and racer.result().ok:
                        return racer.result()
            return racers[0].result()  # all failed: the original's failure counts
        finally:
            for racer in racers:
                racer.cancel()
            await asyncio.gather(*racers, return_exceptions=True)

    def _choose(self, failed: Endpoint | None) -> Endpoint | None:
        """The endpoint of the next attempt: if there is another one than that which just failed, another."""
        pool = self.target.pool
        if pool is None:
            return None
        if self._pinned is not None and failed is None:
            return self._pinned
        return pool.pick(avoid=failed)

    async def _attempt(
        self,
        job: Job,
        endpoint: Endpoint | None,
        retry: int,
        ready: Callable[[Reply], None] | None = None,
        hop: Hop | None = None,
    ) -> Reply:
        loop = asyncio.get_running_loop()
        timeout = self.preference.timeout_s
        origin, head = self._lane(job, endpoint) if hop is None else self._detour(job, hop)
        due = self._deadline if hop is None else hop.due
        if due is not None:
            timeout = max(0.001, min(timeout, due - loop.time()))
        data = self._request(job, head, retry, timeout)
        began = loop.time()
        connection = self.wrapper.take(origin)
        if connection is None:
            try:
                async with asyncio.timeout(timeout):
                    connection = await self.wrapper.connect(origin)
            except TimeoutError:
                raise TimedOut from None
        self._expiry.add(connection, began + timeout)
        sink = job.sink() if job.sink is not None else None
        try:
            reply = await connection.request(
                data, method=job.method, sink=None if sink is None else sink.feed, ready=ready
            )
        except BaseException as error:
            connection.abort()
            if self._limit is not None and isinstance(error, (ConnectionFailed, TimedOut)):
                self._limit.saw(0, loop.time() - began)
            raise
        finally:
            self._expiry.remove(connection)
        self.wrapper.give_back(origin, connection)
        if self._limit is not None:
            self._limit.saw(reply.status, loop.time() - began)
        if 300 <= reply.status < 400:
            base = self.target.base_url if endpoint is None else endpoint.base_url
            url = base + job.path if hop is None else hop.url
            onwards = follow(reply, url, hop, began + timeout)
            if onwards is not None:
                if not onwards.keeps:
                    job = msgspec.structs.replace(
                        job, method="HEAD" if job.method == "HEAD" else "GET", body=None
                    )
                return await self._attempt(job, endpoint, retry, ready, onwards)
        if sink is not None and reply.ok:
            if not sink.complete:
                raise ConnectionFailed("the stream ended before its last event")
            reply.stream = sink
        return reply

    # -- the bytes of a request -------------------------------------------------------------------------

    def _request(self, job: Job, head: bytes, retry: int, timeout: float) -> bytes:
        milliseconds = int(timeout * 1000)
        return b"%b%b-%d-%d\r\nrequest-timeout-ms: %d\r\nrequest-deadline-ms: %d\r\n%b" % (
            head,
            self._id,
            job.index,
            retry,
            milliseconds,
            int(time.time() * 1000) + milliseconds,
            b"\r\n" if job.body is None else b"content-length: %d\r\n\r\n%b" % (len(job.body), job.body),
        )

    def _lane(self, job: Job, endpoint: Endpoint | None) -> tuple[Origin, bytes]:
        """Origin and all of the head that does not change from request to request."""
        base = self.target.base_url if endpoint is None else endpoint.base_url
        key = (base, job.path, job.method)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = self._head(job, base + job.path, self._headers)
        return lane

    def _detour(self, job: Job, hop: Hop) -> tuple[Origin, bytes]:
        headers = self._headers
        if not hop.trusted:
            headers = {name: value for name, value in headers.items() if name not in SECRETS}
        return self._head(job, hop.url, headers)

    def _head(self, job: Job, url: str, headers: dict[str, str]) -> tuple[Origin, bytes]:
        origin, path = split_url(url)
        target, extra = self.wrapper.target(origin, path)
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        if job.body is None:
            lines = lines.replace("content-type: application/json\r\n", "")
        head = (
            f"{job.method} {target} HTTP/1.1\r\nhost: {origin.netloc}\r\n{extra}{lines}"
            "x-baseten-customer-request-id: "
        )
        return origin, head.encode("latin-1")

    def _common_headers(self, more: dict[str, str]) -> dict[str, str]:
        from headrace import __version__

        preference = self.preference
        headers = {
            "authorization": f"Bearer {preference.primary_api_key_override or self.target.api_key}",
            "content-type": "application/json",
            "accept": "application/json, application/msgpack",
            "accept-encoding": "identity",  # say "gzip" in extra_headers for slow links
            "user-agent": f"headrace-client/{__version__}",
        }
        if preference.trace_context is not None:
            headers["traceparent"] = preference.trace_context.traceparent
            if preference.trace_context.tracestate is not None:
                headers["tracestate"] = preference.trace_context.tracestate
        for extra in (more, preference.extra_headers or {}):
            headers.update({name.lower(): value for name, value in extra.items()})
        try:
            "".join(headers.values()).encode("latin-1")
        except UnicodeEncodeError as error:
            raise InvalidArgument(f"a header value holds a character outside Latin-1: {error}") from None
        if any(c in value for value in headers.values() for c in "\r\n\0"):
            raise InvalidArgument("a header value or the API key holds a line break", param="api_key")
        return headers


def _pause(backoff: float, reply: Reply | None) -> float:
    """Seconds before the next attempt; a server's Retry-After is respected up to 45 s."""
    pause = backoff + random.randrange(100) / 1000.0
    if reply is not None and reply.status in (429, 503):
        asked = reply.headers.get("retry-after", "")
        if asked.isdigit():
            pause = max(pause, min(float(asked), _MAX_BACKOFF_S))
    return pause
