"""Several deployments behind one client: weights, health, who is next."""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import threading
import weakref
from collections.abc import Sequence

from headrace.client import background
from headrace.client.exceptions import ConnectionFailed, InvalidArgument
from headrace.client.logs import log
from headrace.client.transport import HttpClientWrapper, split_url

__all__ = ["Endpoint", "EndpointPool"]


class Endpoint:
    """One deployment, and its health as last seen. Share one instance between pools to share its probes.

    Args:
        base_url: of the deployment; requests go to paths below it.
        api_key: for its health checks.
        client_wrapper: the pool that its health checks use.
        deep_health_url: an absolute URL that must answer 2xx too.
        deployment_health_path: below ``base_url``; default ``/health``.
        health_check_interval_s: seconds between checks, at least 0.1; default 10.
        health_check_timeout_s: seconds for one check; default 6.
        health_check_retries: further tries of a failing check; one success is enough; default 2.
        health_fail_on_first: after one failing check skip the other.
        deployment_timeout_is_no_vote, deep_timeout_is_no_vote: a check that times out keeps the last state;
            default False: it counts as a failure.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str,
        client_wrapper: HttpClientWrapper,
        deep_health_url: str | None = None,
        deployment_health_path: str | None = None,
        health_check_interval_s: float | None = None,
        health_check_timeout_s: float | None = None,
        health_check_retries: int | None = None,
        health_fail_on_first: bool = False,
        deployment_timeout_is_no_vote: bool | None = None,
        deep_timeout_is_no_vote: bool | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        split_url(self.base_url)
        self.wrapper = client_wrapper
        self.interval_s = 10.0 if health_check_interval_s is None else health_check_interval_s
        self.timeout_s = 6.0 if health_check_timeout_s is None else health_check_timeout_s
        self.retries = 2 if health_check_retries is None else health_check_retries
        self.fail_on_first = health_fail_on_first
        for name, value, low in (
            ("health_check_interval_s", self.interval_s, 0.1),
            ("health_check_timeout_s", self.timeout_s, 0.01),
            ("health_check_retries", self.retries, 0),
        ):
            if not math.isfinite(value) or value < low:
                raise InvalidArgument(f"{name} is {value:g}; expected at least {low:g}", param=name)
        path = deployment_health_path if deployment_health_path is not None else "/health"
        self._checks = [(self.base_url + "/" + path.lstrip("/"), bool(deployment_timeout_is_no_vote))]
        if deep_health_url is not None:
            self._checks.append((deep_health_url, bool(deep_timeout_is_no_vote)))
        for url, _ in self._checks:
            split_url(url)
        self._api_key = api_key
        self._lock = threading.Lock()
        self._watch: concurrent.futures.Future[None] | None = None
        self.healthy = True  # until a check says otherwise

    def watch(self) -> None:
        """Begin the background checks; they end when the endpoint is no longer used."""
        with self._lock:
            if self._watch is None:
                self._watch = background.start(_watch(weakref.ref(self)))
                weakref.finalize(self, self._watch.cancel)

    async def refresh(self) -> bool:
        """Check now. The new state."""
        healthy = True
        for url, timeout_is_no_vote in self._checks:
            vote = await self._vote(url, timeout_is_no_vote)
            healthy = healthy and (self.healthy if vote is None else vote)
            if vote is False and self.fail_on_first:
                break
        if healthy != self.healthy:
            log.warning("endpoint %s is now %s", self.base_url, "healthy" if healthy else "unhealthy")
        self.healthy = healthy
        return healthy

    async def _vote(self, url: str, timeout_is_no_vote: bool) -> bool | None:
        timed_out = False
        for _ in range(self.retries + 1):
            try:
                async with asyncio.timeout(self.timeout_s):
                    if await self._get(url):
                        return True
                timed_out = False
            except TimeoutError:
                timed_out = True
            except ConnectionFailed:
                timed_out = False
        return None if timed_out and timeout_is_no_vote else False

    async def _get(self, url: str) -> bool:
        origin, path = split_url(url)
        target, extra = self.wrapper.target(origin, path)
        head = (
            f"GET {target} HTTP/1.1\r\nhost: {origin.netloc}\r\n{extra}accept: */*\r\n"
            f"authorization: Bearer {self._api_key}\r\n\r\n"
        )
        connection = self.wrapper.take(origin) or await self.wrapper.connect(origin)
        try:
            reply = await connection.request(head.encode("latin-1"))
        except asyncio.CancelledError:
            connection.abort()
            raise
        self.wrapper.give_back(origin, connection)
        return reply.ok


async def _watch(ref: weakref.ref[Endpoint]) -> None:
    while (endpoint := ref()) is not None:
        await endpoint.refresh()
        interval = endpoint.interval_s
        del endpoint  # so that it can be collected while we sleep
        await asyncio.sleep(interval)


class EndpointPool:
    """Weighted, deterministic choice among healthy endpoints.

    The choice is smooth weighted round robin: with weights 3 and 1, every fourth request goes to the second.
    When no endpoint is healthy all are tried, rather than none.

    Args:
        endpoints: not empty.
        endpoint_weights: finite, not negative, not all zero; default: all equal.
    """

    def __init__(
        self, endpoints: Sequence[Endpoint], endpoint_weights: Sequence[float] | None = None
    ) -> None:
        if not endpoints:
            raise InvalidArgument("endpoints is empty; give at least one", param="endpoints")
        weights = [1.0] * len(endpoints) if endpoint_weights is None else [float(w) for w in endpoint_weights]
        if len(weights) != len(endpoints):
            raise InvalidArgument(
                f"endpoint_weights has {len(weights)} values for {len(endpoints)} endpoints",
                param="endpoint_weights",
            )
        if any(not math.isfinite(w) or w < 0 for w in weights) or not sum(weights):
            raise InvalidArgument(
                f"endpoint_weights is {weights}; expected finite numbers from 0 up, not all 0",
                param="endpoint_weights",
            )
        self.endpoints = list(endpoints)
        self.weights = weights
        self._credit = [0.0] * len(weights)

    def watch(self) -> None:
        for endpoint in self.endpoints:
            endpoint.watch()

    def pick(self, avoid: Endpoint | None = None) -> Endpoint:
        """The next endpoint; another one than ``avoid`` if a healthy one with a weight is there."""
        usable = [i for i, e in enumerate(self.endpoints) if e.healthy and self.weights[i]]
        usable = usable or [i for i, w in enumerate(self.weights) if w]
        others = [i for i in usable if self.endpoints[i] is not avoid] if avoid is not None else usable
        usable = others or usable
        total = 0.0
        for i in usable:
            self._credit[i] += self.weights[i]
            total += self.weights[i]
        best = max(usable, key=lambda i: self._credit[i])
        self._credit[best] -= total
        return self.endpoints[best]
