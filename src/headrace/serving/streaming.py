"""Server-sent events: the stream of one call, from its first delta to [DONE]."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from aiohttp import web

from headrace.errors import HeadraceError
from headrace.llm import Delta, Generation
from headrace.serving.call import Call
from headrace.serving.errors import to_error
from headrace.serving.exchange import current
from headrace.serving.parsers.turn import Turn
from headrace.serving.verify import Verifier

__all__ = ["Writer", "send_stream"]

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class Writer(Protocol):
    """Turns deltas into the events of one API."""

    def begin(self) -> bytes:
        """Events before the first text."""
        ...

    def chunks(self, deltas: Sequence[Delta]) -> bytes:
        """Events for what one step brought; empty when there is nothing to tell."""
        ...

    def turn(self, index: int) -> Turn:
        """One choice so far."""
        ...

    def failure(self, error: HeadraceError) -> bytes:
        """The event of an error after the stream has begun."""
        ...

    def end(self) -> bytes:
        """Events after the last text, [DONE] among them."""
        ...


async def send_stream(
    call: Call, generation: Generation, writer: Writer, verifier: Verifier | None = None
) -> web.StreamResponse:
    """Send a call as events; everything that is there at one moment goes out in one write.

    Headers wait for the first delta, so that what fails before it has its proper status code. What fails
    later is an error event, and the connection closes. Cancelling (the client left) aborts the call.
    """
    response = web.StreamResponse(headers=_HEADERS | current().headers())
    try:
        await _send(call, generation, writer, response, verifier)
    except ConnectionResetError:  # noticed while writing, before the handler is cancelled
        call.record.fail(asyncio.CancelledError())
        return response
    except (Exception, asyncio.CancelledError) as error:
        if not response.prepared or (isinstance(error, asyncio.CancelledError) and not call.expired):
            raise
        told = call.too_late() if call.expired else to_error(error)  # type: ignore[arg-type]
        call.record.fail(told)
        response.force_close()
        await response.write(writer.failure(told))
    finally:
        await generation.aclose()
    await response.write_eof()
    return response


async def _send(
    call: Call,
    generation: Generation,
    writer: Writer,
    response: web.StreamResponse,
    verifier: Verifier | None,
) -> None:
    async for deltas in generation:
        call.record.tokens(deltas)
        data = b"" if response.prepared else writer.begin()
        data += writer.chunks(deltas)
        if verifier is not None:
            for delta in deltas:
                await verifier.look(writer.turn(delta.index), delta)
        if not response.prepared:
            await response.prepare(call.request)
        if data:
            await response.write(data)
    if not response.prepared:
        await response.prepare(call.request)
        await response.write(writer.begin())
    await response.write(writer.end())
