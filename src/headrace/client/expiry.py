"""Time limits of many requests under one timer."""

from __future__ import annotations

import asyncio

from headrace.client.http1 import Connection

__all__ = ["Expiry", "TimedOut"]


class TimedOut(Exception):
    """One attempt was not answered in ``timeout_s``."""


class Expiry:
    """Aborts connections whose request is not answered in time.

    One timer at the earliest time serves all requests of an operation; a timer for each cost a twentieth of a
    request.
    """

    def __init__(self) -> None:
        self._due: dict[Connection, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, connection: Connection, at: float) -> None:
        """Abort with TimedOut at this time of the running loop."""
        self._due[connection] = at
        if self._timer is None or at < self._timer.when():
            self._arm(at)

    def remove(self, connection: Connection) -> None:
        self._due.pop(connection, None)

    def _arm(self, at: float) -> None:
        self.close()
        self._timer = asyncio.get_running_loop().call_at(at, self._fire)

    def _fire(self) -> None:
        now = asyncio.get_running_loop().time()
        self._timer = None
        for connection in [late for late, at in self._due.items() if at <= now]:
            del self._due[connection]
            connection.abort(TimedOut())
        if self._due:
            self._arm(min(self._due.values()))

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
