"""Start engine cores: each in a process of its own (msgpack over ZMQ), or in a thread of this one."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from typing import Any

from headrace.config.spec import EngineSpec
from headrace.engines.attached import Attachment, SocketClient, connect
from headrace.engines.child import CoreChild
from headrace.engines.dispatch import DispatchClient, error_of
from headrace.engines.loop import Core, CoreLoop
from headrace.errors import EngineDead
from headrace.messages import (
    Failed,
    Forget,
    FromCore,
    Loading,
    Ready,
    Shutdown,
    ToCore,
    decode_from_core,
)

__all__ = ["InProcessClient", "ProcessClient", "start", "start_in_process"]

_CLOSE_SECONDS = 10.0


OnLoading = Callable[[int, int, str], None]  # see Loading


async def start(
    spec: EngineSpec, on_loading: OnLoading | None = None, child: CoreChild | None = None
) -> ProcessClient:
    """Start a core process for ``spec`` and wait until it has loaded its model.

    Args:
        child: a process started before; it is taken over, and ended whatever happens.

    Raises the core's own error (ModelError, ConfigError, DoesNotFit, ...) when it cannot start.
    """
    return await ProcessClient.start(spec, on_loading, child)


# --- the serving side --------------------------------------------------------------------------------


class ProcessClient(SocketClient):
    """A core in a process of its own, which this one started."""

    def __init__(self, spec: EngineSpec, ready: Ready, process: CoreChild, socket: Any, address: str) -> None:
        super().__init__(spec, ready, socket)
        self._process = process
        self._address = address

    @classmethod
    async def start(
        cls, spec: EngineSpec, on_loading: OnLoading | None = None, child: CoreChild | None = None
    ) -> ProcessClient:
        """See `headrace.engines.process.start`."""
        address = f"ipc://{tempfile.gettempdir()}/headrace-{uuid.uuid4().hex[:16]}"
        process = child or CoreChild(spec)
        process.give(spec, address)
        socket = await connect(address)
        try:
            ready = await _until_ready(socket, process, on_loading)
        except BaseException:
            process.end()
            socket.close()
            raise
        return cls(spec, ready, process, socket, address)

    def share(self, name: bytes) -> Attachment:
        """What another process needs to be a client of this core (`headrace.engines.attached`).

        ``name`` is its own for all time: a process that replaces another has another name.
        """
        return Attachment(self.spec, self.ready, self._address, self._process.pid, name)

    def forget(self, name: bytes) -> None:
        """The process that was given this name is gone: the core drops its requests."""
        if self._failure is None:
            self._send(Forget(name))

    async def close(self, drain: bool = True) -> None:
        """See EngineClient."""
        self._draining = True
        if self._process.exit_code is None and self._failure is None:
            self._send(Shutdown(drain))
        deadline = None if drain else time.monotonic() + _CLOSE_SECONDS
        while self._process.exit_code is None and (deadline is None or time.monotonic() < deadline):
            await asyncio.sleep(0.02)
        self._process.end()
        self._disconnect()

    def _death(self) -> str | None:
        code = self._process.exit_code
        return None if code is None else f"with exit code {code}"


async def _until_ready(socket: Any, process: CoreChild, on_loading: OnLoading | None) -> Ready:
    while True:
        if await socket.poll(100):
            message = decode_from_core(await socket.recv())
            if isinstance(message, Loading) and on_loading is not None:
                on_loading(message.done, message.total, message.part)
            if isinstance(message, Ready):
                return message
            if isinstance(message, Failed):
                raise error_of(message)
        elif process.exit_code is not None:
            raise EngineDead(
                f"the engine process died with exit code {process.exit_code} before it was ready; "
                "its standard error says why (exit code -9 is usually the kernel's out-of-memory killer)"
            )


# --- in this process ---------------------------------------------------------------------------------


class _QueueTransport:
    """Messages as objects between a thread and an event loop."""

    def __init__(self) -> None:
        self.inbox: queue.SimpleQueue[ToCore] = queue.SimpleQueue()
        self.client: InProcessClient | None = None

    def receive(self, timeout: float) -> list[tuple[bytes, ToCore]]:
        messages: list[tuple[bytes, ToCore]] = []
        with contextlib.suppress(queue.Empty):
            if timeout:
                messages.append((b"", self.inbox.get(timeout=timeout)))
            while True:
                messages.append((b"", self.inbox.get_nowait()))
        return messages

    def send(self, client: bytes, message: FromCore) -> None:
        if self.client is not None:
            self.client.post(message)

    def broadcast(self, message: FromCore) -> None:
        self.send(b"", message)

    def forget(self, client: bytes) -> None:
        """The only client lives as long as this transport."""


class InProcessClient(DispatchClient):
    """A core in a thread of this process: for tests and for embedding the library."""

    def __init__(self, spec: EngineSpec, ready: Ready, core: Core) -> None:
        super().__init__(spec, ready)
        self._loop = asyncio.get_running_loop()
        self._transport = _QueueTransport()
        self._transport.client = self
        self._thread = threading.Thread(target=self._run, args=(core,), name="headrace-core", daemon=True)
        self._thread.start()

    def _run(self, core: Core) -> None:
        try:
            CoreLoop(core, self._transport).run()
        except Exception as error:
            self.post(Failed(f"{type(error).__name__}: {error}", "engine_dead", traceback.format_exc()))

    def post(self, message: FromCore) -> None:
        """From the core's thread to the event loop."""
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._receive, message)

    def _send(self, message: ToCore) -> None:
        self._transport.inbox.put(message)

    async def close(self, drain: bool = True) -> None:
        """See EngineClient."""
        self._draining = True
        self._send(Shutdown(drain))
        await asyncio.to_thread(self._thread.join)
        self._fail("the engine was closed")


async def start_in_process(spec: EngineSpec) -> InProcessClient:
    """Build the core here; raises what building raises."""
    from headrace.engines.build import build

    core, ready = await asyncio.to_thread(build, spec)
    return InProcessClient(spec, ready, core)
