"""Stored responses: in memory, bounded, the oldest forgotten first."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import msgspec

from headrace.errors import NotFound

__all__ = ["ResponseStore", "Stored"]


class Stored(msgspec.Struct, frozen=True):
    """A finished response.

    Attributes:
        reply: as it was answered, JSON.
        messages: the conversation up to its end, as chat messages.
    """

    reply: bytes
    messages: list[dict[str, Any]]


class ResponseStore:
    """Responses by id.

    Args:
        limit: kept at most.
        limit_bytes: their JSON at most.
    """

    def __init__(self, limit: int = 4096, limit_bytes: int = 64 * 2**20) -> None:
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._kept: OrderedDict[str, tuple[Stored, int]] = OrderedDict()

    def put(self, name: str, stored: Stored) -> None:
        """Keep one, and forget the oldest ones where there is no room."""
        size = len(stored.reply) + len(msgspec.json.encode(stored.messages))
        self._kept[name] = (stored, size)
        self._bytes += size
        while self._kept and (len(self._kept) > self._limit or self._bytes > self._limit_bytes):
            _, (_, freed) = self._kept.popitem(last=False)
            self._bytes -= freed

    def get(self, name: str, param: str) -> Stored:
        """Raises NotFound."""
        found = self._kept.get(name)
        if found is None:
            raise NotFound(
                f"no response {name[:80]!r}: it was not stored (store: false), was deleted, or made room for newer "
                "ones",
                param=param,
            )
        return found[0]

    def delete(self, name: str) -> None:
        """Raises NotFound."""
        self.get(name, "id")
        _, size = self._kept.pop(name)
        self._bytes -= size
