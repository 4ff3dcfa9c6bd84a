"""Browsers on other origins (the Fetch standard's CORS protocol): preflights, and who may read answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import hdrs, web

from headrace.errors import ConfigError

__all__ = ["add_cors", "check_origins"]

_PREFLIGHT_SECONDS = "600"  # browsers keep the answer so long
_METHODS = "GET, POST, DELETE"
_EXPOSED = "X-Request-Id, Retry-After"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def check_origins(origins: tuple[str, ...]) -> None:
    """Raises ConfigError for what is no origin: ``*``, or a scheme and a host without a path."""
    for origin in origins:
        scheme, _, host = origin.partition("://")
        if origin != "*" and not (scheme and host and "/" not in host and " " not in origin):
            raise ConfigError(
                f"--cors-allow-origin is {origin[:80]!r}; expected * or an origin such as https://app.example.com"
            )


def add_cors(app: web.Application, origins: tuple[str, ...]) -> None:
    """Let pages of these origins (``*``: all) call this server. Keys are needed as ever: no cookies are read."""
    if not origins:
        return
    allowed = frozenset(origins)

    def grants(request: web.Request) -> str | None:
        if "*" in allowed:
            return "*"
        origin = request.headers.get(hdrs.ORIGIN, "")
        return origin if origin in allowed else None

    @web.middleware
    async def preflight(request: web.Request, handler: Handler) -> web.StreamResponse:
        """Browsers ask before they send a key or JSON, and cannot send a key with that."""
        asked = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_METHOD)
        if request.method != hdrs.METH_OPTIONS or asked is None or grants(request) is None:
            return await handler(request)
        headers = {
            hdrs.ACCESS_CONTROL_ALLOW_METHODS: _METHODS,
            hdrs.ACCESS_CONTROL_MAX_AGE: _PREFLIGHT_SECONDS,
        }
        wanted = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS)
        if wanted:
            headers[hdrs.ACCESS_CONTROL_ALLOW_HEADERS] = wanted
        return web.Response(status=204, headers=headers)

    async def mark(request: web.Request, response: web.StreamResponse) -> None:
        """Also of streams and errors."""
        if "*" not in allowed:
            response.headers.add(hdrs.VARY, hdrs.ORIGIN)
        granted = grants(request)
        if granted is not None and hdrs.ORIGIN in request.headers:
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = granted
            response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = _EXPOSED

    app.middlewares.insert(0, preflight)
    app.on_response_prepare.append(mark)
