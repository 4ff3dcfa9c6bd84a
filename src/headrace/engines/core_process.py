"""A core in a process of its own, run as ``python -m headrace.engines.core_process DEVICE PARENT``.

It imports what every core needs and, unless DEVICE is cpu, creates the GPU's context. Then it reads its spec, the
address to listen on and its parent's process id from standard input (pickled by that parent, see child.py). It ends
with its parent, whose id is PARENT: who asks the system may have lost it already.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from typing import Any, Literal

from headrace.config.spec import EngineSpec
from headrace.engines.child import remove_socket
from headrace.engines.kernel_cache import keep_kernels
from headrace.engines.loop import CoreLoop
from headrace.engines.stages import Stages, process_began
from headrace.errors import HeadraceError
from headrace.execution.context import prepare
from headrace.messages import Failed, FromCore, Loading, Shutdown, ToCore, decode_to_core, encode

__all__ = ["ZmqTransport", "main"]


class ZmqTransport:
    """ROUTER socket of a core; every serving process is a DEALER."""

    def __init__(self, address: str, parent: int) -> None:
        import zmq

        self._zmq = zmq
        self._socket: Any = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 2000)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.bind(address)
        self._clients: set[bytes] = set()
        self._parent = parent

    def receive(self, timeout: float) -> list[tuple[bytes, ToCore]]:
        messages: list[tuple[bytes, ToCore]] = []
        if timeout:
            self._socket.poll(int(timeout * 1000))
        if os.getppid() != self._parent:  # asked at every step: nobody is left to read what this core makes
            return [(b"", Shutdown(drain=False))]
        with contextlib.suppress(self._zmq.Again):
            while True:
                client, data = self._socket.recv_multipart(self._zmq.NOBLOCK)
                if client not in self._clients:
                    self._clients.add(client)
                if data:
                    messages.append((client, decode_to_core(data)))
        return messages

    def wait_for_client(self) -> None:
        """Until somebody says hello (an empty message)."""
        while not self._clients:
            self.receive(1.0)
            if os.getppid() != self._parent:
                raise SystemExit(1)

    def send(self, client: bytes, message: FromCore) -> None:
        self._socket.send_multipart((client, encode(message)), self._zmq.NOBLOCK)

    def broadcast(self, message: FromCore) -> None:
        data = encode(message)
        for client in self._clients:
            self._socket.send_multipart((client, data), self._zmq.NOBLOCK)

    def forget(self, client: bytes) -> None:
        self._clients.discard(client)

    def close(self) -> None:
        self._socket.close()


class _Throttle:
    """Tells how far weights or kernels are, ten times a second at most, and at its end."""

    def __init__(self, transport: ZmqTransport, part: Literal["weights", "kernels"]) -> None:
        self._transport, self._part = transport, part
        self._last = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done in (0, total) or now - self._last > 0.1:
            self._last = now
            self._transport.broadcast(Loading(done, total, self._part))


class _Orphaned(threading.Thread):
    """Ends this process when its parent is gone, until told that the loop, which sees that too, has begun."""

    def __init__(self, parent: int) -> None:
        super().__init__(name="headrace-parent", daemon=True)
        self._parent = parent
        self.address = ""
        self.over = threading.Event()

    def run(self) -> None:
        """Look five times a second."""
        while not self.over.wait(0.2):
            if os.getppid() != self._parent:
                remove_socket(self.address)
                os._exit(1)


def _run_core(spec: EngineSpec, address: str, parent: int, stages: Stages, alone: _Orphaned) -> None:
    """Until the parent says shutdown, or is gone."""
    alone.address = address
    transport = ZmqTransport(address, parent)
    transport.wait_for_client()
    try:
        from headrace.engines.build import build

        core, ready = build(
            spec, _Throttle(transport, "weights"), stages, on_compiling=_Throttle(transport, "kernels")
        )
        alone.over.set()
        transport.broadcast(ready)
        CoreLoop(core, transport).run()
    except Exception as error:
        code = error.code if isinstance(error, HeadraceError) else "engine_dead"
        message = error.message if isinstance(error, HeadraceError) else f"{type(error).__name__}: {error}"
        transport.broadcast(Failed(message, code, traceback.format_exc()))
    finally:
        transport.close()


def _import_all(device: str, stages: Stages) -> None:
    """What a core needs whatever it runs; what cannot be imported is told when the spec is there."""
    keep_kernels()
    beside = threading.Thread(target=prepare, name="headrace-context", daemon=True)
    if device != "cpu":
        beside.start()
    # Torch's threads are left to spin between two operations, which nearly halves a small model's step;
    # execution/threads.py takes them away while other processes want the cores.
    with contextlib.suppress(ImportError):
        import headrace.engines.build  # noqa: F401
    stages.done("imports")
    if device != "cpu":
        beside.join()
        stages.done("context")


def main() -> None:
    """Read what to run from standard input, and run it."""
    stages = Stages(process_began())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the serving process decides when a core ends
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    device, starter = sys.argv[1], int(sys.argv[2])
    alone = _Orphaned(starter)
    alone.start()
    stages.done("python")
    _import_all(device, stages)
    try:
        spec, address, parent = pickle.load(sys.stdin.buffer)
    except EOFError:  # nobody wants a core any more
        return
    sys.stdin.close()
    stages.done("waiting")
    _run_core(spec, address, parent, stages, alone)


if __name__ == "__main__":
    main()
