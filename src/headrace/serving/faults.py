"""Replies to what is no HTTP: a broken request line, headers that are too large. The same JSON as all errors."""

from __future__ import annotations

import logging
import uuid

from aiohttp import web

from headrace.errors import HeadraceError, InvalidRequest
from headrace.serving.errors import error_body

__all__ = ["Runner"]

log = logging.getLogger(__name__)


class Runner(web.AppRunner):
    """Runs an app whose connections answer in JSON even where no request could be read."""

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        server.__class__ = _Server
        return server


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Connection(web.RequestHandler):
    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer and close. One line in the log for what is no HTTP: everybody on the network can send it."""
        if status >= 500:
            super().handle_error(request, status, exc, message)  # logs; a bug, or a client that left
            error = HeadraceError("internal error; the server's log has the details", code="internal_error")
        else:
            reason = " ".join((message or "").split("\n\n")[0].split()).rstrip(":")
            error = InvalidRequest(f"this is no HTTP that can be read: {reason}", code="malformed_http")
            log.info("malformed HTTP from %s: %s", request.remote, reason[:200])
            if request.writer.output_size > 0:
                raise ConnectionError("a reply has begun, so that the fault cannot be told")
        response = web.Response(
            status=status,
            body=error_body(error),
            content_type="application/json",
            headers={"x-request-id": uuid.uuid4().hex},
        )
        response.force_close()
        return response
