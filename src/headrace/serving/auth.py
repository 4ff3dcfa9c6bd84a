"""API keys: compared in constant time, kept as digests."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from aiohttp import web

from headrace.errors import AuthenticationFailed

__all__ = ["Keys"]

_SCHEMES = ("bearer", "api-key")


class Keys:
    """The keys that open this server; none: it is open to all."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def check(self, request: web.Request) -> None:
        """Raise AuthenticationFailed unless the request carries one of the keys."""
        if not self._digests:
            return
        header = request.headers.get("Authorization", "")
        scheme, _, key = header.partition(" ")
        key = key.strip()
        if not header and "x-api-key" in request.headers:  # Anthropic's clients
            scheme, key = "api-key", request.headers["x-api-key"].strip()
        if not key or scheme.lower() not in _SCHEMES:
            raise AuthenticationFailed(
                "no API key; send the header 'Authorization: Bearer KEY' (or 'Api-Key KEY')",
                code="missing_api_key",
            )
        given = _digest(key)
        matches = [hmac.compare_digest(given, known) for known in self._digests]  # all of them: constant time
        if not any(matches):
            raise AuthenticationFailed("the API key is not one of this server's keys")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
