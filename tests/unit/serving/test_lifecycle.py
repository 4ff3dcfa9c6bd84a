"""Keys, queue, cancellation, deadlines, failures, health, drain: what surrounds a request."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from headrace.config.spec import EngineSpec
from headrace.engines.scripted import Step
from headrace.errors import ConfigError, EngineDead, UnknownArchitecture
from headrace.serving.admission import Rate
from headrace.serving.logs import JsonFormatter
from headrace.serving.server import _WATCH, Server, serve
from headrace.serving.state import Model, ServerOptions
from headrace.types import Request
from support.serving import LiveServer, events, live, says, scripted_model

ASK = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
SLOW = says("0123456789", delay=0.02, eos=False)


def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def send(server: LiveServer, body: dict[str, Any], path: str = "/v1/chat/completions") -> socket.socket:
    data = json.dumps(body).encode()
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    sock.sendall(head.encode() + data)
    return sock


def metric(server: LiveServer, name: str, **labels: str) -> float:
    _, text, _ = server.request("GET", "/metrics")
    for line in text.splitlines():
        key, _, value = line.rpartition(" ")
        if key.split("{")[0] == name and all(f'{k}="{v}"' in key for k, v in labels.items()):
            return float(value)
    raise AssertionError(f"no metric {name} {labels}")


# Keys


def test_keys_open_the_api_and_nothing_else_does() -> None:
    with live(api_keys=("one", "schlüssel")) as server:
        for header in (
            "Bearer one",
            "bearer one",
            "Api-Key one",
            "Bearer schlüssel".encode().decode("latin-1"),
        ):
            status, _, _ = server.post("/v1/chat/completions", ASK, Authorization=header)
            assert status == 200, header
        for header in ("Bearer two", "Bearer ", "one", "Basic one", "Bearer one two", "Bearer onE"):
            status, body, headers = server.post("/v1/chat/completions", ASK, Authorization=header)
            assert status == 401, header
            assert body["error"]["type"] == "authentication_error"
            assert headers["www-authenticate"] == "Bearer"
        assert server.post("/v1/chat/completions", b"not json")[0] == 401
        assert server.request("GET", "/metrics")[0] == 401
        assert server.request("GET", "/v1/nowhere")[0] == 401
        for path in ("/health", "/ready", "/docs", "/openapi.json"):
            assert server.request("GET", path)[0] == 200
        assert len(server.core().requests) == 4


# The queue


def test_full_queue_answers_429_with_retry_after() -> None:
    with live(scripted_model(SLOW, max_num_seqs=2, max_queue=1)) as server:
        socks = [send(server, ASK) for _ in range(3)]
        until(lambda: server.core().num_unfinished == 3)
        status, body, headers = server.post("/v1/chat/completions", ASK)
        assert status == 429
        assert body["error"]["type"] == "rate_limit_error"
        assert int(headers["retry-after"]) >= 1
        assert metric(server, "headrace_rejected_requests_total", model="m") == 1
        for sock in socks:
            sock.close()
        until(lambda: server.core().num_unfinished == 0)
        status, _, _ = server.post("/v1/chat/completions", ASK | {"max_tokens": 1})
        assert status == 200


def test_every_choice_takes_a_place_but_a_lone_request_always_gets_in() -> None:
    with live(scripted_model(SLOW, max_num_seqs=1, max_queue=1)) as server:
        assert server.post("/v1/chat/completions", ASK | {"n": 5, "max_tokens": 1})[0] == 200
        sock = send(server, ASK)
        until(lambda: server.core().num_unfinished == 1)
        assert server.post("/v1/chat/completions", ASK | {"n": 2})[0] == 429
        sock.close()


def test_rate_is_an_average_that_fades() -> None:
    rate = Rate(window=10)
    for second in range(100):
        rate.add(5, float(second))
    assert rate.value(99.0) == pytest.approx(5, rel=0.05)
    assert rate.value(120.0) < 1


# Clients that leave


@pytest.mark.parametrize("more", [{"stream": True}, {}, {"n": 3}, {"n": 3, "stream": True}])
def test_a_client_that_leaves_is_aborted_and_counted(more: dict[str, Any]) -> None:
    with live(scripted_model(SLOW)) as server:
        sock = send(server, ASK | more)
        n = more.get("n", 1)
        until(lambda: server.core().stats.output_tokens >= 3 * n)
        sock.close()
        until(lambda: server.core().num_unfinished == 0)
        assert len(server.core().aborted) == n
        until(lambda: metric(server, "headrace_requests_in_flight", model="m") == 0)
        assert metric(server, "headrace_requests_total", model="m", outcome="abort") == 1
        sampled = server.core().stats.output_tokens
        counted = metric(server, "headrace_output_tokens_total", model="m")
        assert sampled - n <= counted <= sampled  # what was on its way when the client left may be lost
        assert metric(server, "headrace_aborted_output_tokens_total", model="m") == counted


def test_leaving_before_the_first_token_aborts() -> None:
    with live(scripted_model(says("x", delay=30))) as server:
        sock = send(server, ASK)
        until(lambda: server.core().num_unfinished == 1)
        sock.close()
        until(lambda: server.core().num_unfinished == 0)
        assert metric(server, "headrace_input_tokens_total", model="m") > 0


def test_leaving_aborts_embeddings() -> None:
    with live(scripted_model(name="e", kind="embed", encode_delay=30)) as server:
        sock = send(server, {"model": "e", "input": ["a", "b"]}, "/v1/embeddings")
        until(lambda: server.core("e").num_unfinished == 2)
        sock.close()
        until(lambda: server.core("e").num_unfinished == 0)
        assert len(server.core("e").aborted) == 2


def test_openai_stream_closed_early_aborts() -> None:
    with live(scripted_model(SLOW)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        stream = client.chat.completions.create(**ASK, stream=True)
        next(iter(stream))
        stream.close()
        until(lambda: server.core().aborted)


# Deadlines


@pytest.mark.parametrize("stream", [False, True])
def test_deadline_before_the_first_token_is_408(stream: bool) -> None:
    with live(scripted_model(says("x", delay=30))) as server:
        headers = {"Request-Timeout-Ms": "500"}
        status, body, _ = server.post("/v1/chat/completions", ASK | {"stream": stream}, **headers)
        assert status == 408
        assert body["error"]["code"] == "timeout"
        until(lambda: server.core().num_unfinished == 0)
        assert server.core().requests[0].deadline is not None


def test_deadline_in_a_stream_is_an_error_event() -> None:
    def begins(request: Request) -> Iterator[Step]:
        yield Step((65,))
        yield Step((66,), delay=30)

    with live(scripted_model(begins)) as server:
        headers = {"Request-Timeout-Ms": "1500"}
        status, text, _ = server.post("/v1/chat/completions", ASK | {"stream": True}, **headers)
        assert status == 200
        found = events(text)
        assert found[-1]["error"]["code"] == "timeout"
        assert found[1]["choices"][0]["delta"]["content"]
        until(lambda: server.core().num_unfinished == 0)
        assert metric(server, "headrace_requests_total", model="m", outcome="timeout") == 1


# Failures


def failing(after: int, **how: str) -> Callable[[Request], Iterator[Step]]:
    def script(request: Request) -> Iterator[Step]:
        for _ in range(after):
            yield Step((65,))
        yield Step(**how)

    return script


def test_a_failed_request_fails_alone() -> None:
    with live(scripted_model(failing(0, error="bad cell")), scripted_model(name="good")) as server:
        status, body, _ = server.post("/v1/chat/completions", ASK)
        assert status == 500
        assert "bad cell" in body["error"]["message"]
        assert server.post("/v1/chat/completions", ASK | {"model": "good"})[0] == 200
        assert server.request("GET", "/health")[0] == 200


def test_what_the_core_refuses_is_the_clients_error() -> None:
    with live(scripted_model(failing(0, error="the grammar is too large", code="invalid_value"))) as server:
        for stream in (False, True):
            status, body, _ = server.post("/v1/chat/completions", ASK | {"stream": stream})
            assert status == 400
            assert body["error"]["message"] == "the grammar is too large"


def test_failure_in_a_stream_is_an_error_event_and_openai_raises_it() -> None:
    with live(scripted_model(failing(3, error="bad cell"))) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match="bad cell"):
            list(client.chat.completions.create(**ASK, stream=True))
        _, text, _ = server.post("/v1/chat/completions", ASK | {"stream": True})
        assert events(text)[-1]["error"]["type"] == "server_error"
        assert "[DONE]" not in text


@pytest.mark.parametrize("n", [1, 3])
def test_dead_engine_is_503_and_red(n: int) -> None:
    with live(scripted_model(failing(0, dies="cuda is gone"))) as server:
        status, body, _ = server.post("/v1/chat/completions", ASK | {"n": n})
        assert status == 503
        assert "cuda is gone" in body["error"]["message"]
        status, body, _ = server.request("GET", "/health")
        assert status == 503
        assert "cuda is gone" in body["reason"]
        assert metric(server, "headrace_engine_healthy", model="m") == 0


def test_stalled_engine_is_red_while_draining_is_not() -> None:
    with live() as server:
        server.core().state, server.core().reason = "stalled", "no step for 31 s"
        assert server.request("GET", "/health")[0] == 503
        assert server.request("GET", "/ready")[0] == 503
        server.core().state = "draining"
        assert server.request("GET", "/health")[0] == 200


def test_a_bug_is_a_500_in_the_same_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    with live() as server:
        monkeypatch.setattr(type(server.core()), "generate", lambda self, request: 1 / 0)
        status, body, _ = server.post("/v1/chat/completions", ASK)
        assert status == 500
        assert body["error"]["code"] == "internal_error"
        assert "division" not in body["error"]["message"]


# Logs, ids, metrics, pages


def test_request_ids_are_echoed_and_bad_ones_replaced() -> None:
    with live() as server:
        for path in ("/v1/models", "/nowhere"):
            assert (
                server.request("GET", path, headers={"x-request-id": "abc-1"})[2]["x-request-id"] == "abc-1"
            )
        _, _, headers = server.post("/v1/chat/completions", ASK | {"stream": True}, **{"x-request-id": "s"})
        assert headers["x-request-id"] == "s"
        given = "x" * 500
        found = server.request("GET", "/v1/models", headers={"x-request-id": given})[2]["x-request-id"]
        assert found != given


@pytest.mark.parametrize("show", [False, True])
def test_logs_are_json_and_hold_prompts_only_when_asked(caplog: pytest.LogCaptureFixture, show: bool) -> None:
    with caplog.at_level(logging.INFO, "headrace"), live(log_prompts=show) as server:
        secret = {"role": "user", "content": "s3cret"}
        server.post("/v1/chat/completions", ASK | {"messages": [secret]}, **{"x-request-id": "id-1"})
        until(lambda: any(r.name == "headrace.serving.requests" for r in caplog.records))
    lines = [JsonFormatter().format(record) for record in caplog.records]
    assert ("s3cret" in "".join(lines)) == show
    line = next(json.loads(line) for line in lines if "id-1" in line)
    assert line["route"] == "/v1/chat/completions"
    assert line["status"] == 200
    assert line["completion_tokens"] == 7
    assert line["outcome"] == "stop"


def test_metrics_count_tokens_and_times() -> None:
    with live() as server:
        for _ in range(3):
            server.post("/v1/chat/completions", ASK)
        assert metric(server, "headrace_output_tokens_total", model="m") == 3 * 7
        assert metric(server, "headrace_input_tokens_total", model="m") == 3 * 20
        assert metric(server, "headrace_time_to_first_token_seconds_count", model="m") == 3
        assert metric(server, "headrace_inter_token_seconds_count", model="m") == 3 * 6
        assert metric(server, "headrace_request_seconds_bucket", model="m", le="+Inf") == 3
        assert metric(server, "headrace_requests_total", model="m", outcome="stop") == 3
        assert (
            metric(server, "headrace_http_responses_total", route="/v1/chat/completions", status="200") == 3
        )
        assert metric(server, "headrace_engine_output_tokens_total", model="m") == 3 * 7


def test_api_page_and_document() -> None:
    with live() as server:
        _, document, _ = server.request("GET", "/openapi.json")
        assert document["openapi"].startswith("3.1")
        assert "temperature" in document["components"]["schemas"]["ChatRequest"]["properties"]
        _, page, headers = server.request("GET", "/docs")
        assert headers["content-type"].startswith("text/html")
        assert "http://" not in page
        assert "https://" not in page


# Start and end


def test_requests_while_loading_are_503_then_served() -> None:
    spec = EngineSpec(model="m")
    loaded = scripted_model().loaded
    assert loaded is not None
    go = threading.Event()

    async def start(_: EngineSpec) -> Any:
        await asyncio.to_thread(go.wait)
        return loaded

    with live() as helper:  # only for its loop

        async def make() -> Server:
            server = Server([Model(spec)], ServerOptions(port=0), start)
            await server.listen()
            return server

        helper.server, old = helper.call(make()), helper.server
        helper.port = int(helper.server.url.rsplit(":", 1)[1])
        loading = asyncio.run_coroutine_threadsafe(helper.server.load(), helper.loop)
        assert helper.request("GET", "/health")[0] == 200
        assert helper.request("GET", "/ready")[0] == 503
        status, body, headers = helper.post("/v1/chat/completions", ASK)
        assert (status, body["error"]["code"], headers["retry-after"]) == (503, "not_ready", "1")
        go.set()
        loading.result(60)
        assert helper.request("GET", "/ready")[0] == 200
        assert helper.post("/v1/chat/completions", ASK)[0] == 200
        helper.call(old.close())


def test_a_model_that_cannot_load_is_an_error_of_load() -> None:
    async def main() -> None:
        async def start(_: EngineSpec) -> Any:
            raise UnknownArchitecture("no such family")

        server = Server([Model(EngineSpec(model="m"))], ServerOptions(port=0), start)
        await server.listen()
        with pytest.raises(ExceptionGroup) as caught:
            await server.load()
        assert isinstance(caught.value.exceptions[0], UnknownArchitecture)
        await server.close()

    asyncio.run(main())


def test_drain_finishes_what_runs_and_takes_nothing_new() -> None:
    go = threading.Event()

    def waits(request: Request) -> Iterator[Step]:
        while not go.is_set():
            yield Step(delay=0.01)
        yield from says("0123456789")(request)

    with live(scripted_model(waits)) as server:
        idle = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        sock = send(server, ASK | {"stream": True})
        until(lambda: server.core().num_unfinished == 1)
        closing = asyncio.run_coroutine_threadsafe(server.server.close(), server.loop)
        until(lambda: server.state.draining)
        idle.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 503 " in idle.recv(4096).split(b"\r\n")[0]
        with pytest.raises(OSError):
            until(lambda: socket.create_connection(("127.0.0.1", server.port), timeout=60).close())
        go.set()
        data = b""
        while part := sock.recv(65536):
            data += part
        assert b"[DONE]" in data
        assert data.count(b'"content":"') == 11
        closing.result(60)
        assert server.core().health().status == "dead"
        server.server.close = lambda: asyncio.sleep(0)  # type: ignore[method-assign]


def test_drain_is_bounded() -> None:
    with live(scripted_model(SLOW), drain_seconds=0.2) as server:
        sock = send(server, ASK)
        until(lambda: server.core().num_unfinished == 1)
        start = time.monotonic()
        server.call(server.server.close())
        assert time.monotonic() - start < 60  # it would go on for 80
        assert server.core().num_unfinished == 0
        sock.close()
        server.server.close = lambda: asyncio.sleep(0)  # type: ignore[method-assign]


def test_a_server_ends_when_its_last_engine_died_and_not_before() -> None:
    """Whoever started it can then start it anew; with one engine left it goes on."""
    models = [scripted_model(), scripted_model(name="e", kind="embed")]
    first, second = (model.engine.client for model in models)
    server = Server(models, ServerOptions(port=0, drain_seconds=0.1))

    async def scenario() -> None:
        running = asyncio.create_task(serve(server, lambda _: None, lambda _: None))
        await asyncio.sleep(0.1)
        first.state, first.reason = "dead", "code -9"  # type: ignore[attr-defined]
        await asyncio.sleep(2.5 * _WATCH)
        assert not running.done()
        second.state, second.reason = "dead", "code -9"  # type: ignore[attr-defined]
        with pytest.raises(EngineDead, match=r"no engine is left \(code -9\)"):
            await asyncio.wait_for(running, 60)

    asyncio.run(scenario())


def test_a_data_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"--data-dir .*file/data cannot be used: Not a directory"):
        Server([scripted_model()], ServerOptions(data_dir=str(tmp_path / "file" / "data")))
