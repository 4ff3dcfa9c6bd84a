"""A real HTTP/1.1 server on a thread that does what a test tells it, and remembers what it was asked.

It is written on bare asyncio so that faults are exact: resets, half replies, slow bodies, silence.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Recorded", "Reply", "ScriptedServer", "closed_port", "embeddings"]


@dataclass
class Recorded:
    """One request as it came in."""

    at: float
    method: str
    path: str
    headers: dict[str, str]  # lower-case names
    body: bytes
    connection: int
    number: int  # order of arrival, from 0
    gone: bool = False  # the client left before the reply was written

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Reply:
    """What to answer.

    Attributes:
        body: bytes, or anything that JSON can hold.
        when: asked until it says yes, for 60 s at most, before ``delay`` begins.
        delay: seconds before the first byte.
        chunks: sent chunked instead of ``body``, ``pause`` seconds apart.
        fault: ``reset`` (RST before a byte), ``close`` (FIN before a byte), ``half`` (half of the body, then
            RST), ``silent`` (nothing until the client leaves).
    """

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    when: Callable[[], bool] | None = None
    delay: float = 0.0
    chunks: list[bytes] | None = None
    pause: float = 0.0
    fault: str = ""
    close: bool = False


Handler = Callable[[Recorded], Reply]


def embeddings(request: Recorded, dim: int = 4) -> Reply:
    """A vector for each input that depends on its text alone: [length, first code point, 0.5, ...]."""
    texts = request.json["input"]
    data = [
        {
            "object": "embedding",
            "index": i,
            "embedding": ([float(len(t)), float(ord(t[0])) if t else 0.0] + [0.5] * dim)[:dim],
        }
        for i, t in enumerate(texts)
    ]
    usage = {"prompt_tokens": len(texts), "total_tokens": len(texts)}
    return Reply({"object": "list", "data": data, "model": request.json["model"], "usage": usage})


@contextmanager
def closed_port() -> Iterator[int]:
    """A port where nobody listens, and that nobody else is given meanwhile: a ``ScriptedServer`` may."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


class ScriptedServer:
    """``with ScriptedServer(handler) as server: ... server.url ... server.requests``.

    Args:
        handler: from request to reply; or an iterable of replies, one a request in order of arrival.
        port: one of ``closed_port``, to let an endpoint die and come back.
        tls: a server-side context.
    """

    def __init__(
        self, handler: Handler | Iterable[Reply], port: int = 0, tls: ssl.SSLContext | None = None
    ) -> None:
        if callable(handler):
            self._handler: Handler = handler
        else:
            script = iter(handler)
            self._handler = lambda request: next(script)
        self._tls = tls
        self._ready = threading.Event()
        self.port = port
        self.requests: list[Recorded] = []
        self.connections = 0
        self.open: set[asyncio.Transport] = set()
        self.in_flight = 0
        self.peak = 0

    @property
    def url(self) -> str:
        return f"http{'s' if self._tls else ''}://127.0.0.1:{self.port}"

    def __enter__(self) -> ScriptedServer:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        assert self._ready.wait(60), "the scripted server did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        server = await self._loop.create_server(
            lambda: _Connection(self),
            "127.0.0.1",
            self.port,
            backlog=2048,
            ssl=self._tls,
            reuse_port=bool(self.port),
        )
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for transport in list(self.open):
            transport.abort()

    def settle(self) -> None:
        """Until everything is read that clients have sent so far: some turns of the loop, each of which looks."""

        async def turns() -> None:
            for _ in range(20):
                await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(turns(), self._loop).result(60)

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60.0) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(0.005)
        return condition()


class _Connection(asyncio.Protocol):
    def __init__(self, server: ScriptedServer) -> None:
        self.server = server
        self.buffer = b""
        self.current: Recorded | None = None
        self.task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.server.open.add(transport)
        self.id = self.server.connections
        self.server.connections += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.open.discard(self.transport)
        if self.current is not None:
            self.current.gone = True
        if self.task is not None:
            self.task.cancel()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if self.task is None:
            self._next()

    def _next(self) -> None:
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        first, *lines = self.buffer[:end].decode("latin-1").split("\r\n")
        headers = {k.strip().lower(): v.strip() for k, v in (line.split(":", 1) for line in lines)}
        if headers.get("transfer-encoding") == "chunked":
            raise AssertionError("the scripted server takes no chunked requests")
        stop = end + 4 + int(headers.get("content-length", 0))
        if len(self.buffer) < stop:
            return
        body, self.buffer = self.buffer[end + 4 : stop], self.buffer[stop:]
        method, path, _ = first.split(" ", 2)
        server = self.server
        request = Recorded(time.monotonic(), method, path, headers, body, self.id, len(server.requests))
        server.requests.append(request)
        server.in_flight += 1
        server.peak = max(server.peak, server.in_flight)
        self.current = request
        self.task = asyncio.ensure_future(self._answer(request))

    async def _answer(self, request: Recorded) -> None:
        try:
            try:
                reply = self.server._handler(request)
            except Exception as error:  # a broken script must not look like a slow server
                reply = Reply({"error": f"script: {error!r}"}, status=500)
            await self._write(request, reply)
        finally:
            self.server.in_flight -= 1
            self.current = None
        self.task = None
        if self.buffer:
            self._next()

    async def _write(self, request: Recorded, reply: Reply) -> None:
        if reply.when is not None:
            limit = time.monotonic() + 60
            while not reply.when() and time.monotonic() < limit:
                await asyncio.sleep(0.005)
        if reply.delay:
            await asyncio.sleep(reply.delay)
        if reply.fault == "silent":
            await asyncio.sleep(3600)
        if reply.fault in ("reset", "close"):
            return self._drop(reset=reply.fault == "reset")
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        names = {name.lower() for name in reply.headers}
        head = [f"HTTP/1.1 {reply.status} Scripted"]
        head += [f"{name}: {value}" for name, value in reply.headers.items()]
        if "content-type" not in names:
            head.append("content-type: application/json")
        if reply.chunks is not None:
            head.append("transfer-encoding: chunked")
        elif "content-length" not in names:
            head.append(f"content-length: {len(body)}")
        if reply.close:
            head.append("connection: close")
        start = ("\r\n".join(head) + "\r\n\r\n").encode("latin-1")
        if reply.fault == "half":
            self.transport.write(start + body[: len(body) // 2])
            await asyncio.sleep(0.05)
            return self._drop(reset=False)
        if reply.chunks is None:
            self.transport.write(start if request.method == "HEAD" else start + body)
        else:
            self.transport.write(start)
            for chunk in reply.chunks:
                if reply.pause:
                    await asyncio.sleep(reply.pause)
                self.transport.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            self.transport.write(b"0\r\n\r\n")
        if reply.close:
            self.transport.close()
        return None

    def _drop(self, reset: bool) -> None:
        if reset:
            raw = self.transport.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
        else:
            self.transport.close()
