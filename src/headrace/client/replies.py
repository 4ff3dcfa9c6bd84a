"""What all kinds of replies share."""

from __future__ import annotations

from typing import Any

import msgspec

from headrace.client.exceptions import BadReply
from headrace.client.http1 import Reply
from headrace.client.operation import Job

__all__ = ["OpenAIUsage", "in_order", "kind_of", "unreadable"]


class OpenAIUsage(msgspec.Struct, gc=False):
    """Tokens, summed over the requests of an operation."""

    prompt_tokens: int
    total_tokens: int


def kind_of(reply: Reply) -> str:
    lower = reply.head.lower()
    if b"msgpack" in lower:
        content_type = reply.headers.get("content-type", "")
        if content_type.split(";")[0].strip() in ("application/msgpack", "application/x-msgpack"):
            return "msgpack"
    if b"octet-stream" in lower and "octet-stream" in reply.headers.get("content-type", ""):
        return "raw"
    return "json"


def unreadable(reply: Reply, error: Exception) -> BadReply:
    start = bytes(reply.body[:80])
    return BadReply(f"cannot read the {reply.status} reply: {error}; it begins {start!r}")


def in_order(job: Job, rows: list[Any]) -> list[Any]:
    """Rows sorted by index. Raises BadReply unless the indices are exactly those of the inputs sent."""
    if len(rows) != job.items:
        raise BadReply(f"the server answered {len(rows)} inputs of {job.items}")
    if [row.index for row in rows] == list(range(job.items)):
        return rows
    ordered = sorted(rows, key=lambda row: row.index)
    if any(row.index != i for i, row in enumerate(ordered)):
        wrong = sorted(row.index for row in rows)[:8]
        raise BadReply(f"the reply's indices are {wrong}; expected each of 0 to {job.items - 1} once")
    return ordered
