"""One HTTP/1.1 connection (RFC 9112), as little Python per request as it takes.

docs/decisions/0040-client-http.md has the measurements that led to writing it.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from typing import Any, cast

from headrace.client.exceptions import BadReply, ConnectionFailed

__all__ = ["Connection", "Reply", "Sink"]

MAX_HEAD = 1 << 20  # bytes; a metadata header of raw embeddings can be long
_CHUNKED, _TO_THE_END = -1, -2
_RECEIVE = memoryview(bytearray(1 << 18))  # shared: it is emptied before the loop reads another socket

Sink = Callable[[bytes], None]


class Reply:
    """A whole reply. ``body`` is decoded from any content-encoding."""

    __slots__ = ("body", "head", "seconds", "status", "stream", "value")

    def __init__(self, status: int, head: bytes, body: bytes) -> None:
        self.status = status
        self.head = head
        self.body = body
        self.seconds = 0.0
        self.stream: Any = None  # what took a streamed body
        self.value: Any = None  # what a whole 2xx reply was parsed to

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    @property
    def headers(self) -> dict[str, str]:
        """Names in lower case; a repeated header joins with a comma (RFC 9110, 5.3)."""
        out: dict[str, str] = {}
        for line in self.head.decode("latin-1").split("\r\n")[1:]:
            name, _, value = line.partition(":")
            name, value = name.strip().lower(), value.strip()
            out[name] = f"{out[name]}, {value}" if name in out else value
        return out


_CONNECTION, _ENCODING = b"\r\nconnection:", b"\r\ncontent-encoding:"
_TRANSFER, _LENGTH = b"\r\ntransfer-encoding:", b"\r\ncontent-length:"


def _field(lower: bytes, name: bytes) -> bytes:
    """Value of a header in a lower-cased head; empty when absent. Repeats must agree."""
    at = lower.find(name)
    if at < 0:
        return b""
    start = at + len(name)
    end = lower.find(b"\r\n", start)
    value = lower[start : end if end >= 0 else len(lower)].strip()
    again = lower.find(name, start)
    if again >= 0 and _field(lower[again:], name) != value:
        raise ConnectionFailed(f"the reply holds two different {name[2:-1].decode()} headers")
    return value


class Connection(asyncio.BufferedProtocol):
    """One request at a time; ``request`` gives a future of its Reply.

    Args:
        lost: called once with the connection when it is gone.
    """

    __slots__ = (
        "_chunks",
        "_close_after",
        "_encoding",
        "_future",
        "_head",
        "_late",
        "_left",
        "_loop",
        "_lost",
        "_method",
        "_pending",
        "_ready",
        "_sink",
        "_status",
        "closed",
        "idle_since",
        "reused",
        "transport",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, lost: Callable[[Connection], None]) -> None:
        self._loop = loop
        self._lost = lost
        self._future: asyncio.Future[Reply] | None = None
        self.transport: asyncio.Transport
        self.closed = False
        self.reused = False
        self.idle_since = 0.0

    # -- the requester's side -------------------------------------------------------------------------

    def request(
        self,
        data: bytes,
        *,
        method: str = "POST",
        sink: Sink | None = None,
        ready: Callable[[Reply], None] | None = None,
    ) -> asyncio.Future[Reply]:
        """Write a whole request.

        Args:
            ready: called with a whole 2xx reply before anything else is read, so that its body is parsed while it
                is in the cache and freed before the next one comes; what it raises fails the request.
            method: the reply to HEAD, and 2xx to CONNECT, have no body whatever their headers say.
            sink: receives the pieces of a 2xx body as they come; the Reply's body is then empty.
        """
        self._future = future = self._loop.create_future()
        self._method = method
        self._sink = sink
        self._ready = ready
        self._head = b""
        self._pending = b""
        self._chunks: list[bytes] = []
        self._status = 0
        self.transport.write(data)
        return future

    def abort(self, error: BaseException | None = None) -> None:
        """Close at once; the request in flight fails with ``error``."""
        self.closed = True
        future, self._future = self._future, None
        if future is not None and not future.done():
            if error is None:
                future.cancel()
            else:
                future.set_exception(error)
        self.transport.abort()

    # -- the transport's side -------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        # asyncio.Protocol would allocate 256 KiB for each read; page faults were half of a request's cost
        return _RECEIVE

    def buffer_updated(self, nbytes: int) -> None:
        data = bytes(_RECEIVE[:nbytes])
        if self._future is None:  # nothing was asked: the peer is out of step
            self.abort()
            return
        try:
            if not self._head:
                rest = self._take_head(data)
                if rest is None:
                    return
                data = rest
            self._take_body(data)
        except Exception as error:
            self.abort(error)

    def _take_head(self, data: bytes) -> bytes | None:
        """The bytes after the head, or None while it is incomplete. Interim 1xx replies are skipped."""
        data = self._pending + data if self._pending else data
        while True:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                if len(data) > MAX_HEAD:
                    raise ConnectionFailed(f"the reply's head is over {MAX_HEAD} bytes")
                self._pending = data
                return None
            head = data[:end]
            if not head.startswith(b"HTTP/1.") or not head[9:12].isdigit():
                raise ConnectionFailed(f"the reply does not begin like HTTP/1.1: {head[:40]!r}")
            status = int(head[9:12])
            data = data[end + 4 :]
            if status >= 200 or status == 101:
                break
        self._head, self._status, self._pending = head, status, b""
        self._frame(head, status)
        return data

    def _frame(self, head: bytes, status: int) -> None:
        """Where does the body end (RFC 9112, 6.3), and does the connection stay?"""
        lower = head.lower()
        persistent = b"close" not in _field(lower, _CONNECTION)
        if head.startswith(b"HTTP/1.0"):
            persistent = b"keep-alive" in _field(lower, _CONNECTION)
        self._encoding = _field(lower, _ENCODING)
        length = _field(lower, _LENGTH)
        bodiless = self._method == "HEAD" or (self._method == "CONNECT" and status < 300)
        if bodiless or status in (204, 304):
            self._left = 0
        elif b"chunked" in _field(lower, _TRANSFER):
            self._left = _CHUNKED
        elif length:
            if not length.isdigit():
                raise ConnectionFailed(f"the reply's content-length is {length!r}")
            self._left = int(length)
        else:
            self._left = _TO_THE_END
            persistent = False
        self._close_after = not persistent
        self._late = None
        if self._sink is not None and not (200 <= status < 300):
            self._sink = None  # an error's body is kept whole
        elif self._encoding not in (b"", b"identity"):
            self._late, self._sink = self._sink, None  # it gets the body when it is whole and decoded

    def _take_body(self, data: bytes) -> None:
        left = self._left
        if left == _CHUNKED:
            self._take_chunks(data)
        elif left == _TO_THE_END:
            if data:
                self._keep(data)
        else:
            if len(data) > left:
                raise ConnectionFailed("the reply is longer than its content-length")
            if data:
                self._keep(data)
            self._left = left = left - len(data)
            if not left:
                self._finish()

    def _keep(self, data: bytes) -> None:
        if self._sink is None:
            self._chunks.append(data)
        else:
            self._sink(data)

    def _take_chunks(self, data: bytes) -> None:
        data = self._pending + data if self._pending else data
        at = 0
        while True:
            line = data.find(b"\r\n", at)
            if line < 0:
                break
            try:
                size = int(data[at:line].split(b";", 1)[0], 16)
            except ValueError:
                raise ConnectionFailed(f"a chunk's size is {data[at:line][:40]!r}") from None
            if size == 0:
                if data.find(b"\r\n\r\n", line) < 0:  # trailers, if any, end with an empty line
                    break
                self._finish()
                return
            start, end = line + 2, line + 2 + size
            if len(data) < end + 2:
                break
            if data[end : end + 2] != b"\r\n":
                raise ConnectionFailed("a chunk is not followed by a line break")
            self._keep(data[start:end])
            at = end + 2
        self._pending = data[at:]

    def _finish(self) -> None:
        future, self._future = self._future, None
        chunks = self._chunks
        body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self._chunks = []
        if self._close_after:
            self.closed = True
            self.transport.close()
        if future is not None and not future.done():
            try:
                if self._encoding not in (b"", b"identity"):
                    body = _decode(self._encoding, body)
                    if self._late is not None:
                        self._late(body)
                        body = b""
                reply = Reply(self._status, self._head, body)
                if self._ready is not None and reply.ok:
                    self._ready(reply)
            except Exception as error:
                future.set_exception(error)
                return
            future.set_result(reply)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._lost(self)
        future = self._future
        if future is None or future.done():
            return
        if self._head and self._left == _TO_THE_END and exc is None:
            self._finish()
            return
        self._future = None
        what = f"{type(exc).__name__}: {exc}" if exc else "the server closed the connection"
        where = "in the middle of a reply" if self._head or self._pending else "before a reply"
        stale = self.reused and not self._head and not self._pending
        future.set_exception(ConnectionFailed(f"{what} {where}", stale=stale))


def _decode(encoding: bytes, body: bytes) -> bytes:
    """Undo a content-encoding. Raises BadReply."""
    try:
        if encoding in (b"gzip", b"x-gzip"):
            return zlib.decompress(body, wbits=47)
        if encoding == b"deflate":
            return zlib.decompress(body)
        if encoding == b"zstd":
            return _unzstd(body)
    except Exception as error:  # each library has an exception of its own
        raise BadReply(f"the reply's {encoding.decode()} body does not decompress: {error}") from None
    raise BadReply(
        f"the reply is encoded as {encoding.decode('latin-1')!r}; the client reads gzip, deflate and zstd"
    )


def _unzstd(body: bytes) -> bytes:
    try:
        import zstandard
    except ImportError:
        raise BadReply("zstd needs a package: pip install 'headrace[zstd]'") from None
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    data: bytes = decompressor.decompress(body)
    if not decompressor.eof:
        raise ValueError("it is cut short")
    return data
