"""The child of processes.py: it answers blocks of embedding requests until its parent closes the pipe."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

from headrace.client.background import run
from headrace.client.exceptions import ConnectionFailed
from headrace.client.performance import PerformanceClient
from headrace.client.preference import RequestProcessingPreference, TraceContext
from headrace.client.processes import Done, Work, encoder, work_decoder
from headrace.client.vectors import Vectors

__all__ = ["main"]


def _frames(source: BinaryIO) -> Iterator[bytes]:
    while len(head := source.read(8)) == 8:
        size = int.from_bytes(head, "little")
        data = source.read(size)
        if len(data) < size:
            return
        yield data


def _answer(work: Work) -> Done:
    preference = RequestProcessingPreference(**work.preference)
    if work.trace is not None:
        preference.trace_context = TraceContext(*work.trace)
    client = _clients.get((work.base_url, work.api_key, work.proxy))
    if client is None:
        client = PerformanceClient(work.base_url, work.api_key, proxy=work.proxy)
        _clients[work.base_url, work.api_key, work.proxy] = client
    found = Vectors(sum(map(len, work.groups)))
    try:
        replies = run(client.embed_block(work.groups, work.fields, preference, found))
    except Exception as error:
        return Done(error=_pickled(error))
    return Done(
        found.count,
        found.size,
        found.as_text,
        found.table,
        found.odd,
        found.named,
        found.model,
        found.object,
        found.usage,
        [reply.seconds for reply in replies],
        [reply.head for reply in replies],
    )


_clients: dict[tuple[str, str, str | None], Any] = {}


def _pickled(error: Exception) -> bytes:
    try:
        return pickle.dumps(error)
    except Exception:
        return pickle.dumps(ConnectionFailed(f"{type(error).__name__}: {error}"))


def main() -> None:
    """Answer frames until the parent closes the pipe."""
    out = sys.stdout.buffer
    for frame in _frames(sys.stdin.buffer):
        data = encoder.encode(_answer(work_decoder.decode(frame)))
        out.write(len(data).to_bytes(8, "little"))
        out.write(data)
        out.flush()
