"""TLS, proxies and URLs."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from headrace.client import (
    BadReply,
    ConnectionFailed,
    HttpClientWrapper,
    InvalidArgument,
    PerformanceClient,
    RequestProcessingPreference,
)
from headrace.client.http1 import Connection
from headrace.client.transport import Origin, split_url
from support.scripted_server import Recorded, Reply, ScriptedServer, embeddings

NO_RETRY = RequestProcessingPreference(max_retries=0, timeout_s=30.0)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
    ]
    command += ["-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", "/CN=scripted"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


def serving(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


@contextmanager
def proxy(seen: list[bytes]) -> Iterator[str]:
    """Forwards one request a connection: absolute-form, or a tunnel after CONNECT."""

    def pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            pass
        finally:
            sink.close()

    def one(peer: socket.socket) -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            part = peer.recv(65536)
            if not part:
                peer.close()
                return
            data += part
        seen.append(data.split(b"\r\n\r\n")[0])
        method, target, _ = data.split(b" ", 2)
        if method == b"CONNECT":
            host, port = target.decode().rsplit(":", 1)
            upstream = socket.create_connection((host, int(port)))
            peer.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            origin, path = split_url(target.decode())
            upstream = socket.create_connection((origin.host, origin.port))
            upstream.sendall(data.replace(target, path.encode(), 1))
        threading.Thread(target=pump, args=(upstream, peer), daemon=True).start()
        pump(peer, upstream)

    def accept(listener: socket.socket) -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=one, args=(peer,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        yield f"http://user:p%40ss@127.0.0.1:{listener.getsockname()[1]}"


def test_tls_checks_the_certificate(certificate: tuple[Path, Path]) -> None:
    trusting = HttpClientWrapper(ssl_context=ssl.create_default_context(cafile=str(certificate[0])))
    with ScriptedServer(embeddings, tls=serving(certificate)) as server:
        client = PerformanceClient(server.url, "k", client_wrapper=trusting)
        words = ["x" * (i % 50) for i in range(200)]
        assert client.embed(words, "m").numpy()[:, 0].tolist() == [i % 50 for i in range(200)]
        with pytest.raises(ConnectionFailed, match="certificate"):
            PerformanceClient(server.url, "k").embed(["a"], "m", preference=NO_RETRY)
        elsewhere = server.url.replace("127.0.0.1", "localhost")  # the certificate is for another name
        with pytest.raises(ConnectionFailed):
            PerformanceClient(elsewhere, "k", client_wrapper=trusting).embed(["a"], "m", preference=NO_RETRY)


def test_http_through_a_proxy() -> None:
    seen: list[bytes] = []
    with ScriptedServer(embeddings) as server, proxy(seen) as url:
        client = PerformanceClient(server.url, "k", proxy=url)
        assert len(client.embed(["a", "b"], "m").data) == 2
        assert server.requests[0].path == "/v1/embeddings"
        assert seen[0].startswith(b"POST " + server.url.encode() + b"/v1/embeddings HTTP/1.1\r\n")
        assert b"proxy-authorization: Basic dXNlcjpwQHNz" in seen[0]  # user:p@ss


def test_https_through_a_tunnel(certificate: tuple[Path, Path]) -> None:
    seen: list[bytes] = []
    trust = ssl.create_default_context(cafile=str(certificate[0]))
    with ScriptedServer(embeddings, tls=serving(certificate)) as server, proxy(seen) as url:
        wrapper = HttpClientWrapper(proxy=url, ssl_context=trust)
        client = PerformanceClient(server.url, "k", client_wrapper=wrapper)
        wanted = RequestProcessingPreference(batch_size=1, max_concurrent_requests=2)
        assert client.embed(["a"] * 9, "m", preference=wanted).numpy().shape == (9, 4)
        assert len(server.requests) == 9
        assert 1 <= len(seen) <= 2
        assert all(head.startswith(b"CONNECT 127.0.0.1:%d " % server.port) for head in seen)
        assert not any("proxy-authorization" in request.headers for request in server.requests)


def test_a_proxy_that_refuses() -> None:
    with ScriptedServer(lambda request: embeddings(request)) as refusing:  # answers CONNECT with 500
        client = PerformanceClient("https://127.0.0.1:1", "k", proxy=refusing.url)
        with pytest.raises(ConnectionFailed, match="CONNECT"):
            client.embed(["a"], "m", preference=NO_RETRY)


@pytest.mark.parametrize(
    ("url", "netloc", "path"),
    [
        ("http://h", "h", "/"),
        ("https://h/a?b=c", "h", "/a?b=c"),
        ("http://h:8080/a", "h:8080", "/a"),
        ("https://h:443/", "h", "/"),
        ("http://[::1]:9/x", "[::1]:9", "/x"),
    ],
)
def test_urls(url: str, netloc: str, path: str) -> None:
    origin, found = split_url(url)
    assert (origin.netloc, found) == (netloc, path)


def test_connections_close_with_their_client() -> None:
    with ScriptedServer(embeddings) as server:
        for _ in range(5):
            PerformanceClient(server.url, "k").embed(["a"], "m")
        assert server.connections == 5
        assert server.wait_for(lambda: not server.open)
        wrapper = HttpClientWrapper()
        PerformanceClient(server.url, "k", client_wrapper=wrapper).embed(["a"], "m")
        assert len(server.open) == 1
        wrapper.close()
        assert server.wait_for(lambda: not server.open)


def test_a_cancellation_that_comes_as_a_connection_is_made_is_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the request is sent all the same, and who cancelled waits for its answer."""
    connect = HttpClientWrapper._connect

    async def scenario() -> None:
        async def and_cancel(self: HttpClientWrapper, origin: Origin) -> Connection:
            connection = await connect(self, origin)
            task.cancel()
            return connection

        async def ask() -> None:
            connection = await wrapper.connect(split_url(server.url)[0])
            await connection.request(b"POST / HTTP/1.1\r\ncontent-length: 0\r\n\r\n")

        monkeypatch.setattr(HttpClientWrapper, "_connect", and_cancel)
        wrapper = HttpClientWrapper()
        task = asyncio.ensure_future(ask())
        with pytest.raises(asyncio.CancelledError):
            await task

    with ScriptedServer(lambda request: Reply(b"answered")) as server:
        asyncio.run(scenario())


def test_http_versions() -> None:
    with pytest.warns(UserWarning, match=r"HTTP/1\.1"):
        HttpClientWrapper(http_version=2)
    with pytest.raises(InvalidArgument):
        HttpClientWrapper(http_version=3)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "zstd"])
def test_encoded_bodies(encoding: str) -> None:
    """Whole, cut short, and as a stream of events."""
    if encoding == "zstd":
        pytest.importorskip("zstandard")

    def encode(body: bytes) -> bytes:
        if encoding == "zstd":
            import zstandard

            done: bytes = zstandard.ZstdCompressor().compress(body)
            return done
        return gzip.compress(body) if encoding == "gzip" else zlib.compress(body)

    events = b'data: {"choices":[{"index":0,"delta":{"content":"Hi"}}]}\n\ndata: [DONE]\n\n'

    def handler(request: Recorded) -> Reply:
        whole = events if "chat" in request.path else json.dumps(embeddings(request).body).encode()
        packed = encode(whole)
        packed = packed[:-9] if request.number == 1 else packed
        return Reply(packed, headers={"content-encoding": encoding})

    asking = RequestProcessingPreference(extra_headers={"accept-encoding": encoding}, max_retries=0)
    with ScriptedServer(handler) as server:
        client = PerformanceClient(server.url, "k")
        assert client.embed(["abc"], "m", preference=asking).numpy()[0, 0] == 3
        assert server.requests[0].headers["accept-encoding"] == encoding
        with pytest.raises(BadReply, match="decompress"):
            client.embed(["abc"], "m", preference=asking)
        assert [a.text for a in client.chat(["a"], "m", asking, stream=True)] == ["Hi"]
    with (
        ScriptedServer(lambda request: Reply(b"x", headers={"content-encoding": "br"})) as server,
        pytest.raises(BadReply, match="'br'"),
    ):
        PerformanceClient(server.url, "k").embed(["abc"], "m", preference=asking)


@pytest.mark.parametrize(("level", "lines"), [(None, 0), ("", 0), ("off", 0), ("info", 1), ("DEBUG", 2)])
def test_log_level_of_the_environment(level: str | None, lines: int) -> None:
    """One retry (debug) and one hedge (info), told on standard error."""
    code = """
        import sys, headrace.client as h
        wanted = h.RequestProcessingPreference(batch_size=1, hedge_delay=0.1, initial_backoff_ms=50)
        h.PerformanceClient(sys.argv[1], "k").embed(["a"], "m", preference=wanted)
    """

    def handler(request: Recorded) -> Reply:
        if request.number == 0:
            return Reply(status=503)
        hedged = None if request.number > 1 else lambda: len(server.requests) == 3
        return Reply(embeddings(request).body, when=hedged)

    with ScriptedServer(handler) as server:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        env.pop("PERFORMANCE_CLIENT_LOG_LEVEL", None)
        if level is not None:
            env["PERFORMANCE_CLIENT_LOG_LEVEL"] = level
        command = [sys.executable, "-c", textwrap.dedent(code), server.url]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60)
    assert len(done.stderr.splitlines()) == lines, done.stderr


def test_http_2_is_told_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            PerformanceClient("http://x", "k", 2)
    (warning,) = caught
    assert "HTTP/1.1" in str(warning.message)
    assert warning.filename == __file__
