"""Connections kept open, by origin; TLS and proxies."""

from __future__ import annotations

import asyncio
import base64
import os
import ssl
import time
import warnings
import weakref
from functools import lru_cache, partial
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from headrace.client import background
from headrace.client.exceptions import ConnectionFailed, InvalidArgument
from headrace.client.http1 import Connection

__all__ = ["HttpClientWrapper", "Origin", "split_url"]

_IDLE_S = 60.0  # connections older than this are not reused
_RESOLVE_S = 60.0
_CONNECT_S = 30.0


class Origin(NamedTuple):
    """Where to connect. ``host`` without brackets; ``netloc`` as the Host header wants it."""

    scheme: str
    host: str
    port: int

    @property
    def netloc(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.scheme == "https" else 80) else f"{host}:{self.port}"


@lru_cache(maxsize=1024)
def split_url(url: str) -> tuple[Origin, str]:
    """(origin, path and query) of an absolute http or https URL. Raises InvalidArgument."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InvalidArgument(f"{url!r} is not a URL: {error}", param="base_url") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidArgument(
            f"{url!r} is not an absolute URL; expected something like https://host/path", param="base_url"
        )
    target = parts.path or "/"
    if parts.query:
        target += "?" + parts.query
    if any(ord(c) <= 32 or ord(c) > 126 for c in target + parts.hostname):
        raise InvalidArgument(f"{url!r} holds blanks or characters that must be percent-encoded")
    return Origin(parts.scheme, parts.hostname, port or (443 if parts.scheme == "https" else 80)), target


class HttpClientWrapper:
    """A connection pool that several clients and endpoints can share.

    Args:
        http_version: 1. 2 is accepted for compatibility and speaks HTTP/1.1 too, with a warning.
        proxy: ``http://[user:password@]host:port``; https targets go through it by CONNECT.
        ssl_context: for private certificate authorities; the default trusts the system's.
    """

    def __init__(
        self, http_version: int = 1, proxy: str | None = None, *, ssl_context: ssl.SSLContext | None = None
    ) -> None:
        if http_version == 2:
            warnings.warn(
                "http_version=2: this client speaks HTTP/1.1, a connection for each request in flight",
                stacklevel=3,
            )
        elif http_version != 1:
            raise InvalidArgument(f"http_version is {http_version!r}; expected 1 or 2", param="http_version")
        self.proxy = proxy
        self._proxy: Origin | None = None
        self._proxy_auth = ""
        if proxy is not None:
            self._proxy, _ = split_url(proxy)
            user = urlsplit(proxy)
            if user.username is not None:
                pair = f"{unquote(user.username)}:{unquote(user.password or '')}".encode()
                self._proxy_auth = f"proxy-authorization: Basic {base64.b64encode(pair).decode()}\r\n"
        self._ssl = ssl_context
        self.custom_tls = ssl_context is not None
        self._idle: dict[Origin, list[Connection]] = {}
        self._reset()
        # connections know the dict of idle ones, not this object, so that it can be collected and they closed
        weakref.finalize(self, background.soon, _close_all, self._idle)

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._idle.clear()
        self._addresses: dict[tuple[str, int], tuple[float, list[str]]] = {}
        self._resolving: dict[tuple[str, int], asyncio.Future[list[str]]] = {}

    # Everything below runs on the background loop.

    def target(self, origin: Origin, path: str) -> tuple[str, str]:
        """(request target, extra head lines) for a request to ``origin``."""
        if self._proxy is not None and origin.scheme == "http":
            return f"http://{origin.netloc}{path}", self._proxy_auth
        return path, ""

    def take(self, origin: Origin) -> Connection | None:
        """A kept connection, the most recently used first."""
        if self._pid != os.getpid():
            self._reset()  # a forked child must not write to its parent's sockets
        idle = self._idle.get(origin)
        while idle:
            connection = idle.pop()
            if connection.closed:
                continue
            if time.monotonic() - connection.idle_since > _IDLE_S:
                connection.abort()
                continue
            connection.reused = True
            return connection
        return None

    def give_back(self, origin: Origin, connection: Connection) -> None:
        if not connection.closed:
            connection.idle_since = time.monotonic()
            idle = self._idle.setdefault(origin, [])
            idle.append(connection)
            if connection.idle_since - idle[0].idle_since > _IDLE_S:
                idle.pop(0).abort()  # the least recently used one

    async def connect(self, origin: Origin) -> Connection:
        """A new connection. Raises ConnectionFailed with ``connecting`` set."""
        try:
            # Not wait_for: before Python 3.12 it loses a cancellation that comes as the connection is made.
            async with asyncio.timeout(_CONNECT_S):
                return await self._connect(origin)
        except (OSError, TimeoutError, ssl.SSLError) as error:
            text = str(error) or f"no answer in {_CONNECT_S:g} s"
            raise ConnectionFailed(
                f"cannot connect to {origin.scheme}://{origin.netloc}: {type(error).__name__}: {text}",
                connecting=True,
            ) from error

    async def _connect(self, origin: Origin) -> Connection:
        loop = asyncio.get_running_loop()
        first = self._proxy or origin
        failure: OSError | None = None
        forget = partial(_forget, self._idle)
        for address in await self._resolve(first.host, first.port):
            try:
                _, connection = await loop.create_connection(
                    lambda: Connection(loop, forget),
                    address,
                    first.port,
                    ssl=self._context() if first.scheme == "https" else None,
                    server_hostname=first.host if first.scheme == "https" else None,
                )
                break
            except OSError as error:
                failure = error
        else:
            raise failure or OSError("the name has no address")
        if self._proxy is not None and origin.scheme == "https":
            await self._tunnel(connection, origin)
        return connection

    async def _tunnel(self, connection: Connection, origin: Origin) -> None:
        """CONNECT through the proxy, then TLS inside (RFC 9110, 9.3.6)."""
        loop = asyncio.get_running_loop()
        where = f"{origin.host}:{origin.port}"
        head = f"CONNECT {where} HTTP/1.1\r\nhost: {where}\r\n{self._proxy_auth}\r\n"
        reply = await connection.request(head.encode("latin-1"), method="CONNECT")
        if not reply.ok:
            connection.abort()
            raise OSError(f"the proxy answered {reply.status} to CONNECT {where}")
        transport = await loop.start_tls(
            connection.transport, connection, self._context(), server_hostname=origin.host
        )
        if transport is None:
            raise OSError("the connection closed during the TLS handshake")
        connection.connection_made(transport)

    def _context(self) -> ssl.SSLContext:
        if self._ssl is None:
            self._ssl = ssl.create_default_context()
        return self._ssl

    async def _resolve(self, host: str, port: int) -> list[str]:
        """Addresses of a name, asked once for many connections and kept for a minute."""
        key = (host, port)
        known = self._addresses.get(key)
        if known and time.monotonic() - known[0] < _RESOLVE_S:
            return known[1]
        asking = self._resolving.get(key)
        if asking is None:
            loop = asyncio.get_running_loop()

            async def ask() -> list[str]:
                found = await loop.getaddrinfo(host, port, type=1)  # SOCK_STREAM
                return list(dict.fromkeys(str(info[4][0]) for info in found))

            asking = self._resolving[key] = asyncio.ensure_future(ask())
            asking.add_done_callback(lambda _: self._resolving.pop(key, None))
        addresses = await asyncio.shield(asking)
        self._addresses[key] = (time.monotonic(), addresses)
        return addresses

    def close(self) -> None:
        """Close the kept connections. Requests in flight are not touched."""
        background.soon(_close_all, self._idle)


def _forget(idle: dict[Origin, list[Connection]], connection: Connection) -> None:
    for connections in idle.values():
        if connection in connections:
            connections.remove(connection)
            return


def _close_all(idle: dict[Origin, list[Connection]]) -> None:
    for connections in idle.values():
        for connection in list(connections):
            connection.abort()
