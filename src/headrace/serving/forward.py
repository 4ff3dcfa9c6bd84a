"""Routes with a memory, in an HTTP process that is not the server's first: the first one answers them.

It keeps stored responses, files, batches and everybody's counts; it is reached over a Unix socket, by its own routes.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import aiohttp
from aiohttp import web

from headrace.errors import NotReady
from headrace.serving.exchange import current

__all__ = ["Forward", "is_forwarded"]

_OWNED = ("/v1/responses", "/v1/files", "/v1/batches", "/metrics")
# RFC 9110, 7.6.1, and what aiohttp writes itself
_HOP_BY_HOP = frozenset(
    [
        "connection",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "host",
        "content-length",
        "expect",
        "date",
        "server",
    ]
)


def is_forwarded(path: str) -> bool:
    """Whether this route is answered by the server's first process."""
    return path.startswith(_OWNED)


class Forward:
    """A handler that passes requests on to the process behind a Unix socket, both bodies as streams."""

    def __init__(self, socket: str) -> None:
        self._socket = socket

    async def session(self, _: web.Application) -> AsyncIterator[None]:
        """For ``app.cleanup_ctx``: the connections live as long as the application."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(self._socket, limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
        )
        yield
        await self._session.close()

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        """Raises NotReady when the first process cannot be reached."""
        exchange = current()
        headers = request.headers.copy()
        for name in _HOP_BY_HOP:
            headers.popall(name, None)
        headers["x-request-id"] = exchange.request_id
        url = f"http://localhost{request.raw_path}"
        body = request.content if request.body_exists else None
        try:
            upstream = await self._session.request(
                request.method, url, headers=headers, data=body, allow_redirects=False
            )
        except aiohttp.ClientConnectionError as error:
            raise NotReady("the server's first process cannot be reached; retry later") from error
        exchange.forwarded = True
        with contextlib.closing(upstream):  # a client that leaves takes the request behind this one with it
            return await _copy(request, upstream)


async def _copy(request: web.Request, upstream: aiohttp.ClientResponse) -> web.StreamResponse:
    response = web.StreamResponse(status=upstream.status, reason=upstream.reason)
    for key, value in upstream.headers.items():
        if key.lower() not in _HOP_BY_HOP and not key.lower().startswith(
            "access-control-"
        ):  # cors.py adds them
            response.headers.add(key, value)
    if upstream.content_length is not None:
        response.content_length = upstream.content_length
    await response.prepare(request)
    try:
        if request.method != "HEAD":
            async for chunk in upstream.content.iter_any():
                await response.write(chunk)
        await response.write_eof()
    except aiohttp.ClientPayloadError:
        if request.transport is not None:  # the rest will not come: the client must not take it for the end
            request.transport.abort()
    return response
