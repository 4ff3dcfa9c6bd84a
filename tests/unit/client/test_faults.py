"""What ours does beyond the original: nothing wrong passes as right, cancellation stops work, faults heal."""

from __future__ import annotations

import asyncio
import gzip
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from typing import Any

import pytest

from headrace.client import (
    BadReply,
    CancellationToken,
    Cancelled,
    ConnectionFailed,
    Endpoint,
    EndpointPool,
    HttpClientWrapper,
    HTTPError,
    InvalidArgument,
    PerformanceClient,
    RequestProcessingPreference,
)
from support.scripted_server import Recorded, Reply, ScriptedServer, closed_port, embeddings


def preference(**fields: Any) -> RequestProcessingPreference:
    return RequestProcessingPreference(**{"timeout_s": 30.0, "initial_backoff_ms": 50, **fields})


def vectors(*rows: tuple[int, Any]) -> dict[str, Any]:
    data = [{"object": "embedding", "index": i, "embedding": e} for i, e in rows]
    usage = {"prompt_tokens": 1, "total_tokens": 1}
    return {"object": "list", "data": data, "model": "m", "usage": usage}


@pytest.mark.parametrize(
    "rows",
    [
        [(0, [1.0])],
        [(0, [1.0]), (0, [1.0])],
        [(0, [1.0]), (7, [1.0])],
        [(0, [1.0]), (1, [1.0]), (2, [1.0])],
        [(0, [1.0]), (1, [[1.0]])],
        [(0, [1.0]), (1, {"a": 1})],
        [(0, [1.0]), (1, ["x"])],
        [(0, [1.0]), (1, [1e39])],
        [(-1, [1.0]), (0, [1.0])],
    ],
)
def test_a_reply_that_is_no_answer(rows: list[tuple[int, Any]]) -> None:
    with ScriptedServer(lambda request: Reply(vectors(*rows))) as server, pytest.raises(BadReply):
        PerformanceClient(server.url, "k").embed(["a", "b"], "m", preference=preference())


def test_a_server_that_answers_out_of_order() -> None:
    with ScriptedServer(lambda request: Reply(vectors((1, [2.0]), (0, [1.0])))) as server:
        response = PerformanceClient(server.url, "k").embed(["a", "b"], "m")
    assert [row.index for row in response.data] == [0, 1]
    assert response.numpy().tolist() == [[1.0], [2.0]]


def test_rerank_counts_and_global_order() -> None:
    def handler(request: Recorded) -> Reply:
        found = [{"index": i, "score": float(t)} for i, t in enumerate(request.json["texts"])]
        return Reply(sorted(found, key=lambda r: -r["score"]))

    scores = random.Random(1).sample(range(100), 20)
    with ScriptedServer(handler) as server:
        client = PerformanceClient(server.url, "k")
        response = client.rerank(
            "q", [str(s) for s in scores], sort=True, preference=preference(batch_size=3)
        )
    assert [result.score for result in response.data] == sorted(map(float, scores), reverse=True)
    assert all(float(scores[result.index]) == result.score for result in response.data)
    with (
        ScriptedServer(lambda request: Reply([{"index": 1, "score": 1.0}])) as server,
        pytest.raises(BadReply),
    ):
        PerformanceClient(server.url, "k").rerank("q", ["a"])
    with ScriptedServer(lambda request: Reply([[]])) as server, pytest.raises(BadReply):
        PerformanceClient(server.url, "k").classify(["a", "b"])


def test_the_error_has_its_response() -> None:
    import requests

    reply = Reply({"error": {"message": "no"}}, status=422, headers={"x-why": "because"})
    with ScriptedServer(lambda request: reply) as server, pytest.raises(HTTPError) as caught:
        PerformanceClient(server.url, "k").embed(["a"], "m")
    error = caught.value
    assert isinstance(error, requests.exceptions.HTTPError)
    assert error.response.status_code == error.status == error.args[0] == error.response.args[0] == 422
    assert error.response.json() == {"error": {"message": "no"}}
    assert error.response.headers["x-why"] == "because"
    assert error.response.reason.startswith("Unprocessable")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), copy.args, copy.response.text) == (type(error), error.args, error.response.text)


@pytest.mark.parametrize("encoding", ["base64", "msgpack", "raw", "raw without positions", "float"])
def test_numpy_from_every_form(encoding: str) -> None:
    import base64
    import json

    import msgspec
    import numpy as np

    table = np.random.default_rng(0).standard_normal((7, 5)).astype("<f4")

    def handler(request: Recorded) -> Reply:
        rows = [int(text) for text in request.json["input"]]
        whole = vectors(*((i, [float(x) for x in table[row]]) for i, row in enumerate(rows)))
        if encoding == "base64":
            return Reply(
                vectors(*((i, base64.b64encode(table[r].tobytes()).decode()) for i, r in enumerate(rows)))
            )
        if encoding == "msgpack":
            packed = vectors(*((i, table[row].tobytes()) for i, row in enumerate(rows)))
            kind = {"content-type": "application/msgpack"}
            return Reply(msgspec.msgpack.encode(packed), headers=kind)
        if encoding.startswith("raw"):
            spots = [{"index": i, "start": i * 20, "end": i * 20 + 20} for i in range(len(rows))]
            meta = {"model": "m", "usage": whole["usage"]}
            if encoding == "raw":
                meta["data"] = spots
            kind = {"content-type": "application/octet-stream", "metadata": json.dumps(meta)}
            return Reply(table[rows].tobytes(), headers=kind)
        return Reply(whole)

    with ScriptedServer(handler) as server:
        client = PerformanceClient(server.url, "k")
        response = client.embed([str(i) for i in range(7)], "m", preference=preference(batch_size=3))
    assert np.array_equal(response.numpy(), table)
    assert response.usage.total_tokens == 3
    if encoding != "base64":
        assert response.data[4].embedding == [float(x) for x in table[4]]


def test_raw_floats_of_a_wrong_size() -> None:
    kind = {
        "content-type": "application/octet-stream",
        "metadata": '{"usage":{"prompt_tokens":1,"total_tokens":1}}',
    }
    with ScriptedServer(lambda request: Reply(b"x" * 12, headers=kind)) as server, pytest.raises(BadReply):
        PerformanceClient(server.url, "k").embed(["a", "b"], "m")


@pytest.mark.parametrize("fault", ["half", "reset", "close"])
def test_every_fault_mixed_in_heals(fault: str) -> None:
    """A third of the requests fail once; nothing is lost or doubled, and order is kept."""
    rng = random.Random(fault)
    seen: set[bytes] = set()

    def handler(request: Recorded) -> Reply:
        if request.body not in seen and rng.random() < 0.3:
            seen.add(request.body)
            return Reply(embeddings(request).body, fault=fault)
        return embeddings(request)

    words = ["x" * n for n in range(60)]
    with ScriptedServer(handler) as server:
        response = PerformanceClient(server.url, "k").embed(
            words, "m", preference=preference(batch_size=2, max_concurrent_requests=8)
        )
    assert response.numpy()[:, 0].tolist() == list(range(60))
    assert seen


def test_a_storm_of_429() -> None:
    """Each request is refused twice; every one is answered in the end, in order."""
    counts: dict[bytes, int] = {}

    def handler(request: Recorded) -> Reply:
        counts[request.body] = counts.get(request.body, 0) + 1
        if counts[request.body] <= 2:
            return Reply({"error": "busy"}, status=429)
        return embeddings(request)

    with ScriptedServer(handler) as server:
        response = PerformanceClient(server.url, "k").embed(
            ["x" * n for n in range(30)], "m", preference=preference(batch_size=1)
        )
        assert len(server.requests) == 90
    assert response.numpy()[:, 0].tolist() == list(range(30))


def test_retry_after_is_respected() -> None:
    def handler(request: Recorded) -> Reply:
        return embeddings(request) if request.number else Reply(status=429, headers={"retry-after": "1"})

    with ScriptedServer(handler) as server:
        PerformanceClient(server.url, "k").embed(["a"], "m", preference=preference())
        assert server.requests[1].at - server.requests[0].at >= 1.0


def test_a_failed_copy_does_not_end_the_race() -> None:
    def handler(request: Recorded) -> Reply:
        if request.number:
            return Reply(status=500)
        return Reply(embeddings(request).body, when=lambda: len(server.requests) == 2, delay=0.1)

    with ScriptedServer(handler) as server:
        client = PerformanceClient(server.url, "k")
        assert len(client.embed(["a"], "m", preference=preference(hedge_delay=0.1)).data) == 1
        assert len(server.requests) == 2


def test_chunked_slow_and_compressed_bodies() -> None:
    import json

    def handler(request: Recorded) -> Reply:
        body = json.dumps(embeddings(request).body).encode()
        if request.number % 2:
            return Reply(gzip.compress(body), headers={"content-encoding": "gzip"})
        return Reply(chunks=[body[i : i + 7] for i in range(0, len(body), 7)], pause=0.001)

    with ScriptedServer(handler) as server:
        response = PerformanceClient(server.url, "k").embed(
            ["x" * n for n in range(8)], "m", preference=preference(batch_size=1)
        )
    assert response.numpy()[:, 0].tolist() == list(range(8))


def test_a_body_slower_than_the_time_out() -> None:
    slow = ScriptedServer(lambda request: Reply(chunks=[b"x"] * 100, pause=0.05))
    with slow as server, pytest.raises(OSError) as caught:
        PerformanceClient(server.url, "k").embed(["a"], "m", preference=preference(timeout_s=0.2))
    assert caught.value.args[0] == 408


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
        b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nab",
    ],
)
def test_broken_framing(raw: bytes) -> None:
    def serve(listener: Any) -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            peer.recv(65536)
            peer.sendall(raw)
            time.sleep(0.05)
            peer.close()

    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        client = PerformanceClient(f"http://127.0.0.1:{listener.getsockname()[1]}", "k")
        with pytest.raises(ConnectionFailed):
            client.embed(["a"], "m", preference=preference(max_retries=1))


def test_a_kept_connection_that_died_costs_no_retry() -> None:
    """The server closes after each reply without saying so."""

    def handler(request: Recorded) -> Reply:
        return embeddings(request)

    with ScriptedServer(handler) as server:
        client = PerformanceClient(server.url, "k")
        for _ in range(5):
            client.embed(["a"], "m", preference=preference(max_retries=0))
            for transport in list(server.open):
                server._loop.call_soon_threadsafe(transport.close)
            time.sleep(0.02 * random.random())
        assert len(server.requests) >= 5


def test_cancel_stops_work() -> None:
    """Four are answered, two are under way; nobody answers them, so that only the token can end the call."""
    token = CancellationToken()

    def handler(request: Recorded) -> Reply:
        if request.number == 5:
            token.cancel()
        asked_again = b'"again"' in request.body
        return embeddings(request) if request.number < 4 or asked_again else Reply(fault="silent")

    with ScriptedServer(handler) as server:
        client = PerformanceClient(server.url, "k")
        wanted = preference(batch_size=1, max_concurrent_requests=2, cancel_token=token)
        with pytest.raises(Cancelled):
            client.embed(["a"] * 40, "m", preference=wanted)
        server.settle()
        sent = len(server.requests)
        assert sent == 6
        time.sleep(0.15)
        server.settle()
        assert len(server.requests) == sent
        assert server.wait_for(lambda: server.in_flight == 0)
        with pytest.raises(Cancelled):
            client.embed(["a"], "m", preference=wanted)
        assert len(server.requests) == sent
        assert len(client.embed(["again"], "m").data) == 1  # the client itself is fine


def test_cancelling_the_task_stops_work() -> None:
    def handler(request: Recorded) -> Reply:
        return Reply(fault="silent") if request.number > 3 else embeddings(request)

    async def go(client: PerformanceClient) -> None:
        wanted = preference(batch_size=1, max_concurrent_requests=2)
        task = asyncio.ensure_future(client.async_embed(["a"] * 40, "m", preference=wanted))
        assert await asyncio.to_thread(server.wait_for, lambda: len(server.requests) == 6)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with ScriptedServer(handler) as server:
        asyncio.run(go(PerformanceClient(server.url, "k")))
        assert server.wait_for(lambda: server.in_flight == 0)
        time.sleep(0.15)
        server.settle()
        assert len(server.requests) == 6


def test_ctrl_c_stops_work() -> None:
    code = """
        import sys, headrace.client as h
        try:
            h.PerformanceClient(sys.argv[1], "k").embed(
                ["a"] * 1000, "m",
                preference=h.RequestProcessingPreference(batch_size=1, max_concurrent_requests=2))
        except KeyboardInterrupt:
            print("interrupted")
    """
    with ScriptedServer(lambda request: Reply(embeddings(request).body, delay=0.05)) as server:
        path = os.pathsep.join(sys.path)
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), server.url],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert server.wait_for(lambda: len(server.requests) > 4)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
        assert out == "interrupted\n"
        assert process.returncode == 0


def test_one_failure_cancels_the_rest() -> None:
    """Which nobody ever answers."""

    def handler(request: Recorded) -> Reply:
        if request.number == 3:
            return Reply({"error": "no"}, status=400)
        return Reply(fault="silent")

    with ScriptedServer(handler) as server:
        with pytest.raises(HTTPError):
            PerformanceClient(server.url, "k").embed(
                ["a"] * 100, "m", preference=preference(batch_size=1, max_concurrent_requests=4)
            )
        assert server.wait_for(lambda: server.in_flight == 0)
        server.settle()
        assert len(server.requests) == 4


def test_an_endpoint_that_dies_and_returns() -> None:
    def handler(request: Recorded) -> Reply:
        return embeddings(request) if request.method == "POST" else Reply({})

    with ScriptedServer(handler) as first, closed_port() as port:
        wrapper = HttpClientWrapper()
        with ScriptedServer(handler, port) as second:
            pool = EndpointPool(
                [
                    Endpoint(
                        url,
                        "k",
                        wrapper,
                        health_check_interval_s=0.1,
                        health_check_timeout_s=30.0,
                        health_check_retries=0,
                    )
                    for url in (first.url, second.url)
                ]
            )
            client = PerformanceClient("http://unused", "k", endpoint_pool=pool)
            client.embed(["a"] * 8, "m", preference=preference(batch_size=1))
        # dead now, and not yet known to be: retries go to the other
        response = client.embed(
            ["x" * n for n in range(8)], "m", preference=preference(batch_size=1, retry_budget_pct=3.0)
        )
        assert response.numpy()[:, 0].tolist() == list(range(8))
        assert first.wait_for(lambda: not pool.endpoints[1].healthy)
        with ScriptedServer(handler, port) as back:
            assert back.wait_for(lambda: pool.endpoints[1].healthy)
            client.embed(["a"] * 8, "m", preference=preference(batch_size=1))
            assert any(request.method == "POST" for request in back.requests)


@pytest.mark.parametrize(
    "fields",
    [
        {"extra_headers": {"a b": "c"}},
        {"extra_headers": {"a": "c\r\nd: e"}},
        {"extra_headers": {"content-length": "3"}},
        {"extra_headers": {"a": "日"}},
    ],
)
def test_headers_that_would_break_the_framing(fields: dict[str, Any]) -> None:
    with ScriptedServer(embeddings) as server:
        with pytest.raises(InvalidArgument):
            PerformanceClient(server.url, "k").embed(["a"], "m", preference=preference(**fields))
        assert not server.requests


def test_bad_texts_and_urls() -> None:
    with ScriptedServer(embeddings) as server:
        with pytest.raises(InvalidArgument):
            PerformanceClient(server.url, "k").embed(["\ud800"], "m")
        assert not server.requests
    for url in ("nourl", "ftp://x", "http://", "http://x:99999", "http://x/a b"):
        with pytest.raises(InvalidArgument):
            PerformanceClient(url, "k").embed(["a"], "m")


def test_primary_key_override_and_preference_in_third_place() -> None:
    with ScriptedServer(lambda request: Reply({})) as server:
        wanted = preference(primary_api_key_override="OTHER")
        PerformanceClient(server.url, "k").batch_post("/x", [1], wanted)
        PerformanceClient(server.url, "k").batch_post("/x", [1], {"X-C": "1"}, wanted)
        assert [r.headers["authorization"] for r in server.requests] == ["Bearer OTHER"] * 2
        assert server.requests[1].headers["x-c"] == "1"


def test_several_processes() -> None:
    """The same results in the same order as with one; cancellation, errors and a dead helper are noticed."""
    words = ["x" * (i % 97) for i in range(2000)]
    wanted = preference(batch_size=1, max_concurrent_requests=16)
    poison = threading.Event()
    halt = threading.Event()
    token = CancellationToken()

    def handler(request: Recorded) -> Reply:
        if poison.is_set():
            return Reply({"error": "no"}, status=400)
        if halt.is_set():
            token.cancel()  # nobody is answered any more, so that only this, or a time limit, can end a call
        return Reply(fault="silent") if halt.is_set() else embeddings(request)

    with ScriptedServer(handler) as server:
        client = PerformanceClient(server.url, "k", processes=2)
        response = client.embed(words, "m", preference=wanted)
        assert response.numpy()[:, 0].tolist() == [i % 97 for i in range(2000)]
        assert [row.index for row in response.data] == list(range(2000))
        assert response.usage.total_tokens == len(response.individual_request_times) == 2000
        assert len(server.requests) == 2000
        operations = {r.headers["x-baseten-customer-request-id"].rsplit("-", 2)[0] for r in server.requests}
        assert len(operations) > 2  # one a block
        assert client._helpers is not None
        (helper,) = client._helpers._idle
        os.kill(helper.pid, signal.SIGKILL)
        assert server.wait_for(lambda: helper.returncode is not None)
        assert len(client.embed(words, "m", preference=wanted).data) == 2000
        halt.set()
        with pytest.raises(Cancelled):
            client.embed(words, "m", preference=preference(batch_size=1, cancel_token=token))
        with pytest.raises(OSError) as late:
            client.embed(words, "m", preference=preference(batch_size=1, timeout_s=0.4, total_timeout_s=0.4))
        assert late.value.args[0] == 408
        assert server.wait_for(lambda: server.in_flight == 0)
        halt.clear()
        poison.set()
        with pytest.raises(HTTPError) as caught:
            client.embed(words, "m", preference=wanted)
        assert caught.value.response.json() == {"error": "no"}
        with pytest.raises(InvalidArgument):
            PerformanceClient(server.url, "k", processes=0)


def test_import_is_light() -> None:
    code = (
        "import sys, headrace.client;"
        "print([m for m in ('torch', 'numpy', 'aiohttp', 'requests', 'pydantic') if m in sys.modules])"
    )
    path = os.pathsep.join(sys.path)
    out = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, check=True
    )
    assert out.stdout.strip() == b"[]"


def test_a_forked_child_has_its_own_connections() -> None:
    with ScriptedServer(embeddings) as server:
        client = PerformanceClient(server.url, "k")
        client.embed(["a"], "m")
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = 0 if len(client.embed(["b"], "m").data) == 1 else 1
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        client.embed(["c"], "m")
        assert server.connections == 2
