"""The loop around a core: take messages between two steps, step, send what came of it.

It knows neither HTTP nor tensors: a `Core` turns requests into outputs, a `Transport` carries messages.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Protocol

from headrace.messages import (
    Abort,
    CoreStats,
    EncodeOutputs,
    Forget,
    FromCore,
    Heartbeat,
    Outputs,
    Shutdown,
    Submit,
    ToCore,
)
from headrace.types import EncodeOutput, Output, Request

__all__ = ["HEARTBEAT_SECONDS", "Core", "CoreLoop", "Transport"]

logger = logging.getLogger("headrace.core")

HEARTBEAT_SECONDS = 0.5
QUIET_SECONDS = (
    0.05  # without a message, before work that can wait is done: it holds up the message that comes next
)


class Core(Protocol):
    """A loop's engine: generate, encode, ..."""

    def add(self, requests: Iterable[Request]) -> None:
        """Queue requests; a bad one is answered by an output with an error, never by an exception."""

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget requests; unknown ids are ignored."""

    def has_work(self) -> bool:
        """Whether `step` has anything to do."""

    def step(self) -> Sequence[Output | EncodeOutput]:
        """Advance by one step."""

    def idle(self) -> bool:
        """Called again and again while there is no work; true when it would use more such time."""

    def stats(self) -> CoreStats:
        """Counters and gauges."""

    def close(self) -> None:
        """Free what threads and files there are."""


class Transport(Protocol):
    """Carries messages between a core and its clients, each known by an opaque name."""

    def receive(self, timeout: float) -> list[tuple[bytes, ToCore]]:
        """All messages at hand; waits up to ``timeout`` seconds for the first."""

    def send(self, client: bytes, message: FromCore) -> None:
        """Queue a message for a client; never blocks."""

    def broadcast(self, message: FromCore) -> None:
        """To every client that ever wrote and is not forgotten."""

    def forget(self, client: bytes) -> None:
        """This client is gone."""


class CoreLoop:
    """Runs a core until it is told to stop.

    Args:
        core: what steps.
        transport: where requests come from.
    """

    def __init__(self, core: Core, transport: Transport) -> None:
        self.core = core
        self.transport = transport
        self._owners: dict[str, bytes] = {}
        self._forgotten: set[bytes] = set()
        self._stopping = False
        self._last_beat = 0.0

    def run(self) -> None:
        """Turn until Shutdown; drains first if that asks for it."""
        core = self.core
        gc.freeze()  # what was loaded stays: no collection walks over it while requests wait
        more = True  # to be done in moments without work
        while True:
            wait = 0.0 if core.has_work() else QUIET_SECONDS if more else HEARTBEAT_SECONDS
            for client, message in self.transport.receive(wait):
                self._handle(client, message)
            if core.has_work():
                self._send(core.step())
            elif self._stopping:
                break
            else:
                more = core.idle()
            self._heartbeat()
        core.close()

    def _handle(self, client: bytes, message: ToCore) -> None:
        match message:
            case Submit() if client in self._forgotten:
                pass  # sent before its death, read after we were told
            case Submit(requests):
                for request in requests:
                    self._owners.setdefault(request.id, client)
                self.core.add(requests)
            case Abort(request_ids):
                self.core.abort(request_ids)
                for request_id in request_ids:
                    self._owners.pop(request_id, None)
            case Forget(gone):
                self._forget(gone)
            case Shutdown(drain):
                self._stopping = True
                if not drain:
                    self.core.abort(list(self._owners))

    def _forget(self, client: bytes) -> None:
        """A serving process died: nobody waits for what it asked."""
        owned = [request_id for request_id, owner in self._owners.items() if owner == client]
        self.core.abort(owned)
        for request_id in owned:
            del self._owners[request_id]
        self._forgotten.add(client)
        self.transport.forget(client)

    def _send(self, outputs: Sequence[Output | EncodeOutput]) -> None:
        if not outputs:
            return
        generated: defaultdict[bytes, list[Output]] = defaultdict(list)
        encoded: defaultdict[bytes, list[EncodeOutput]] = defaultdict(list)
        for output in outputs:
            client = self._owners.get(output.request_id)
            if client is None:
                continue
            if isinstance(output, Output):
                generated[client].append(output)
                if output.finish_reason is not None:
                    del self._owners[output.request_id]
            else:
                encoded[client].append(output)
                del self._owners[output.request_id]
        stats = self.core.stats()
        for client, part in generated.items():
            self.transport.send(client, Outputs(tuple(part), stats))
        for client, many in encoded.items():
            self.transport.send(client, EncodeOutputs(tuple(many), stats))

    def _heartbeat(self) -> None:
        """Every client hears of the loop, also one whose requests are none of those that run."""
        now = time.monotonic()
        if now - self._last_beat >= HEARTBEAT_SECONDS:
            self._last_beat = now
            self.transport.broadcast(Heartbeat(self.core.stats()))
