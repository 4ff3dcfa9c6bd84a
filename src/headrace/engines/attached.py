"""Clients of a core over ZMQ; several processes may be clients of one core, each under a name of its own."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import msgspec

from headrace.config.spec import EngineSpec
from headrace.engines.dispatch import DispatchClient
from headrace.messages import Ready, ToCore, decode_from_core, encode

__all__ = ["AttachedClient", "Attachment", "SocketClient", "connect"]


class Attachment(msgspec.Struct, frozen=True):
    """A running core, to be reached from another process of this machine.

    Attributes:
        pid: the core's process.
        name: the new client's ZMQ routing id.
    """

    spec: EngineSpec
    ready: Ready
    address: str
    pid: int
    name: bytes


async def connect(address: str, name: bytes | None = None) -> Any:
    """A DEALER socket that has said hello to the core at ``address``."""
    import zmq
    import zmq.asyncio

    socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    if name is not None:
        socket.setsockopt(zmq.ROUTING_ID, name)
    socket.connect(address)
    await socket.send(b"")
    return socket


class SocketClient(DispatchClient):
    """A client of a core process; subclasses know how to tell that it died."""

    def __init__(self, spec: EngineSpec, ready: Ready, socket: Any) -> None:
        super().__init__(spec, ready)
        self._socket = socket
        self._reader = asyncio.get_running_loop().create_task(self._read())

    def _death(self) -> str | None:
        """How the core's process ended ("with exit code -9"), None while it lives."""
        raise NotImplementedError

    def _disconnect(self) -> None:
        self._reader.cancel()
        self._fail("the engine was closed")
        self._socket.close()

    def _send(self, message: ToCore) -> None:
        import zmq

        # The synchronous send of the underlying socket: unbounded queue, so it never waits.
        zmq.Socket.send(self._socket._shadow_sock, encode(message), zmq.NOBLOCK)

    async def _read(self) -> None:
        while True:
            while await self._socket.poll(200):
                self._receive(decode_from_core(await self._socket.recv()))
            death = None if self._draining else self._death()
            if death is not None:
                self._fail(f"the engine process of {self.spec.name!r} died {death}")
                return


class AttachedClient(SocketClient):
    """A client of a core that another process started and will end."""

    def __init__(self, attachment: Attachment, socket: Any) -> None:
        super().__init__(attachment.spec, attachment.ready, socket)
        self._pid = attachment.pid

    @classmethod
    async def attach(cls, attachment: Attachment) -> AttachedClient:
        """Reach a core; should it be dead already, the client's health says so."""
        return cls(attachment, await connect(attachment.address, attachment.name))

    async def close(self, drain: bool = True) -> None:
        """Let go of the core, which goes on; what is unfinished is aborted."""
        self._draining = True
        if unfinished := [*self._generating, *self._encoding]:
            self.abort(unfinished)
            await asyncio.sleep(0.05)  # closing drops what is not written yet
        self._disconnect()

    def _death(self) -> str | None:
        try:
            # The core's parent takes notice of its end within 0.2 s, so the id is not another's.
            os.kill(self._pid, 0)
        except ProcessLookupError:
            return "(see the log of the server's first process)"
        return None
