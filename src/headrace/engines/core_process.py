"""A core in a process of its own, run as ``python -m headrace.engines.core_process``.

It reads its spec, the address to listen on and its parent's process id from standard input (pickled by that parent),
and ends with its parent.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import time
import traceback
from typing import Any

from headrace.config.spec import EngineSpec
from headrace.engines.loop import CoreLoop
from headrace.errors import HeadraceError
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
    """Tells how far loading is, ten times a second at most, and at its end."""

    def __init__(self, transport: ZmqTransport) -> None:
        self._transport = transport
        self._last = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self._last > 0.1:
            self._last = now
            self._transport.broadcast(Loading(done, total))


def _run_core(spec: EngineSpec, address: str, parent: int) -> None:
    """Until the parent says shutdown, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the serving process decides when a core ends
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Torch's threads are left to spin between two operations, which nearly halves a small model's step;
    # execution/threads.py takes them away while other processes want the cores.
    os.environ.update(spec.environment)
    transport = ZmqTransport(address, parent)
    transport.wait_for_client()
    try:
        from headrace.engines.build import build

        core, ready = build(spec, _Throttle(transport))
        transport.broadcast(ready)
        CoreLoop(core, transport).run()
    except Exception as error:
        code = error.code if isinstance(error, HeadraceError) else "engine_dead"
        message = error.message if isinstance(error, HeadraceError) else f"{type(error).__name__}: {error}"
        transport.broadcast(Failed(message, code, traceback.format_exc()))
    finally:
        transport.close()


def main() -> None:
    """Read what to run from standard input, and run it."""
    spec, address, parent = pickle.load(sys.stdin.buffer)
    sys.stdin.close()
    _run_core(spec, address, parent)


if __name__ == "__main__":
    main()
