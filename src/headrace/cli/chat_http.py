"""A small blocking client of the chat API: starts at once and needs nothing but the standard library."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from headrace.errors import ConfigError, EngineError, InvalidRequest

__all__ = ["ChatClient"]


class ChatClient:
    """Talks to one server.

    Args:
        url: with or without ``/v1`` at its end.
    """

    def __init__(self, url: str, api_key: str = "") -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url is {url!r}; expected something like http://127.0.0.1:8000")
        self._url = url
        self._parts = parts
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def _open(self, method: str, path: str, body: Any = None) -> http.client.HTTPResponse:
        """Send a request; raises ConfigError when nobody answers, InvalidRequest or EngineError for refusals."""
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port)
        data = None if body is None else json.dumps(body).encode()
        try:
            connection.request(method, self._base + path, data, self._headers)
            reply = connection.getresponse()
        except OSError as error:
            raise ConfigError(
                f"no server answers on {self._url} ({error}); start one with 'headrace serve MODEL', "
                "or let this command do it: 'headrace chat MODEL'"
            ) from error
        if reply.status != 200:
            raise _refusal(reply.status, reply.read())
        return reply

    def first_model(self) -> str:
        """The first model that generates text."""
        cards = json.loads(self._open("GET", "/v1/models").read())["data"]
        names: list[str] = [card["id"] for card in cards if card.get("task", "generate") == "generate"]
        if not names:
            raise ConfigError(f"the server on {self._url} has no model that generates text")
        return names[0]

    def stream(self, body: dict[str, Any]) -> Iterator[str]:
        """Pieces of the answer. Leaving the iterator closes the connection, which aborts the request."""
        reply = self._open("POST", "/v1/chat/completions", body | {"stream": True})
        try:
            for line in reply:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise EngineError(event["error"]["message"])
                for choice in event["choices"]:
                    if text := choice["delta"].get("content"):
                        yield text
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"the connection to {self._url} broke: {error}") from error
        finally:
            reply.close()


def _refusal(status: int, data: bytes) -> Exception:
    try:
        message = json.loads(data)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = data.decode("utf-8", "replace")[:300]
    kind = InvalidRequest if status < 500 else EngineError
    return kind(f"{message} (HTTP {status})")
