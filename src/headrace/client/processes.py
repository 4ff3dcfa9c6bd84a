"""Further processes for huge embedding jobs: parsing numbers out of JSON is bound to one core in each.

A child is ``python -c`` with ``main`` of helper.py; frames of MessagePack go over its pipes. So the caller's main
module is not imported again, and a child ends when its parent does.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import sys
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from headrace.client.exceptions import Cancelled, ConnectionFailed
from headrace.client.http1 import Reply
from headrace.client.preference import RequestProcessingPreference
from headrace.client.replies import OpenAIUsage
from headrace.client.vectors import Vectors

if TYPE_CHECKING:
    from headrace.client.core import Core

__all__ = ["Done", "Helpers", "Work", "embed_blocks", "encoder", "work_decoder"]

_BLOCK = 512  # requests in one frame at most
_LOCAL = ("cancel_token", "total_timeout_s", "trace_context")  # what stays with the parent, or is not plain


class Work(msgspec.Struct, array_like=True):
    """Groups of texts to embed, and how."""

    base_url: str
    api_key: str
    proxy: str | None
    trace: tuple[str, str | None] | None
    preference: dict[str, Any]
    fields: dict[str, Any]
    groups: list[list[str]]


class Done(msgspec.Struct, array_like=True):
    """The fields of Vectors; seconds and heads of the replies; or a pickled error."""

    count: int = 0
    size: int = -1
    as_text: bool = False
    table: Any = b""
    odd: dict[int, Any] = {}
    named: dict[int, str] = {}
    model: str = ""
    object: str = "list"
    usage: OpenAIUsage | None = None
    seconds: list[float] = []
    heads: list[bytes] = []
    error: bytes = b""


encoder = msgspec.msgpack.Encoder()
work_decoder = msgspec.msgpack.Decoder(Work)
_done = msgspec.msgpack.Decoder(Done)


class Helpers:
    """The children of one client, started when first needed and ended with it."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._idle: list[asyncio.subprocess.Process] = []
        weakref.finalize(self, _end, self._idle)

    async def take(self) -> asyncio.subprocess.Process:
        while self._idle:
            child = self._idle.pop()
            if child.returncode is None:
                return child
        path = os.pathsep.join(entry for entry in sys.path if entry)
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            "from headrace.client.helper import main; main()",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is the parent's business
            limit=1 << 22,
        )

    def give_back(self, child: asyncio.subprocess.Process) -> None:
        self._idle.append(child)


def _end(children: list[asyncio.subprocess.Process]) -> None:
    for child in children:
        if child.returncode is None:
            try:
                os.kill(child.pid, 9)
            except ProcessLookupError:
                continue


async def embed_blocks(
    core: Core,
    helpers: Helpers,
    groups: list[list[str]],
    fields: dict[str, Any],
    preference: RequestProcessingPreference,
    into: Vectors,
) -> list[Reply]:
    """Vectors of all groups: this process and the helpers each take the next block when free."""
    size = min(_BLOCK, -(-len(groups) // (4 * (helpers.count + 1))))
    blocks = [groups[i : i + size] for i in range(0, len(groups), size)]
    offsets = [0, *itertools.accumulate(sum(map(len, block)) for block in blocks)]
    replies: list[list[Reply]] = [[]] * len(blocks)
    turns = iter(range(len(blocks)))
    share = _share(preference, helpers.count + 1)
    frame = Work(
        core.base_url,
        core.api_key,
        core.get_client_wrapper().proxy,
        _trace(preference),
        {name: value for name, value in vars(share).items() if name not in _LOCAL},
        fields,
        [],
    )

    async def here() -> None:
        for turn in turns:
            replies[turn] = await core.embed_block(blocks[turn], fields, share, into, offsets[turn])

    async def there() -> None:
        child = await helpers.take()
        try:
            for turn in turns:
                work = msgspec.structs.replace(frame, groups=blocks[turn])
                replies[turn] = await _ask(child, work, into, offsets[turn])
        except BaseException:
            if child.returncode is None:
                child.kill()
            raise
        helpers.give_back(child)

    await _together([here(), *(there() for _ in range(helpers.count))], preference)
    return list(itertools.chain.from_iterable(replies))


async def _together(works: Sequence[Any], preference: RequestProcessingPreference) -> None:
    """All of them, or the first failure with the rest cancelled; the token and the total limit apply."""
    loop = asyncio.get_running_loop()
    tasks = [asyncio.ensure_future(work) for work in works]
    cancelled: asyncio.Future[None] = loop.create_future()

    def cancel() -> None:
        if not cancelled.done():
            cancelled.set_result(None)

    def on_cancel() -> None:
        loop.call_soon_threadsafe(cancel)

    token = preference.cancel_token
    if token is not None:
        token._subscribe(on_cancel)
    deadline = None if preference.total_timeout_s is None else loop.time() + preference.total_timeout_s
    pending: set[asyncio.Future[Any]] = set(tasks)
    try:
        while pending:
            left = None if deadline is None else max(0.0, deadline - loop.time())
            done, rest = await asyncio.wait(
                {*pending, cancelled}, timeout=left, return_when=asyncio.FIRST_COMPLETED
            )
            if cancelled in done:
                raise Cancelled("the operation was cancelled by its token")
            if not done:
                from headrace.client.exceptions import Timeout

                raise Timeout(
                    f"Local timeout: the whole operation was not done in {preference.total_timeout_s:g} s",
                    "local",
                )
            for task in done:
                task.result()
            pending = rest - {cancelled}
    finally:
        if token is not None:
            token._unsubscribe(on_cancel)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _share(preference: RequestProcessingPreference, processes: int) -> RequestProcessingPreference:
    """The preference of one of several processes: its part of the requests in flight."""
    share = RequestProcessingPreference(
        **{name: value for name, value in vars(preference).items() if name not in _LOCAL}
    )
    share.max_concurrent_requests = max(1, preference.max_concurrent_requests // processes)
    share.trace_context = preference.trace_context
    return share


def _trace(preference: RequestProcessingPreference) -> tuple[str, str | None] | None:
    context = preference.trace_context
    return None if context is None else (context.traceparent, context.tracestate)


async def _ask(child: asyncio.subprocess.Process, work: Work, into: Vectors, offset: int) -> list[Reply]:
    assert child.stdin is not None and child.stdout is not None
    try:
        data = encoder.encode(work)
        child.stdin.write(len(data).to_bytes(8, "little") + data)
        await child.stdin.drain()
        size = int.from_bytes(await child.stdout.readexactly(8), "little")
        done = _done.decode(await child.stdout.readexactly(size))
    except (asyncio.IncompleteReadError, OSError) as error:
        raise ConnectionFailed(f"a helper process ended with code {child.returncode}: {error}") from None
    if done.error:
        raise pickle.loads(done.error)  # written by our own child
    replies = [Reply(200, head, b"") for head in done.heads]
    for reply, seconds in zip(replies, done.seconds):
        reply.seconds = seconds
    found = Vectors(done.count)
    for name in ("size", "as_text", "odd", "named", "model", "object", "usage"):
        setattr(found, name, getattr(done, name))
    found.table = memoryview(done.table)
    into.merge(offset, found)
    return replies
