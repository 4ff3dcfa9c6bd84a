"""Observable behaviour that both clients share, driven against one scripted server."""

from __future__ import annotations

import math
import random
import re
import threading
import time
from types import ModuleType
from typing import Any

import pytest
import requests

from support.clients import batch_number, client, preference
from support.scripted_server import Recorded, Reply, ScriptedServer, embeddings


def texts(server: ScriptedServer) -> list[list[str]]:
    """Inputs of the requests, in the order of the caller's list (by batch number)."""
    ordered = sorted(server.requests, key=batch_number)
    return [request.json["input"] for request in ordered]


def test_embed_request_and_result(lib: ModuleType) -> None:
    began = time.time()
    with ScriptedServer(embeddings) as server:
        wanted = preference(lib, batch_size=2, max_concurrent_requests=1, timeout_s=5.0)
        response = client(lib, server).embed(
            ["a", "bb", "日本語", "dddd", "e"],
            "m",
            encoding_format="float",
            dimensions=4,
            user="u",
            preference=wanted,
        )
        assert [request.json for request in sorted(server.requests, key=batch_number)] == [
            {"input": part, "model": "m", "encoding_format": "float", "dimensions": 4, "user": "u"}
            for part in (["a", "bb"], ["日本語", "dddd"], ["e"])
        ]
        for request in server.requests:
            assert (request.method, request.path) == ("POST", "/v1/embeddings")
            assert request.headers["authorization"] == "Bearer KEY"
            assert request.headers["content-type"] == "application/json"
            assert request.headers["accept"] == "application/json, application/msgpack"
            identity = request.headers["x-baseten-customer-request-id"]
            assert re.fullmatch(r"perfclient-[0-9a-f]{10}-\d+-0", identity)
            assert request.headers["request-timeout-ms"] == "5000"
            deadline = int(request.headers["request-deadline-ms"]) / 1000
            assert began + 4.9 < deadline < time.time() + 5.1
    assert [row.index for row in response.data] == [0, 1, 2, 3, 4]
    assert [row.embedding for row in response.data][2] == [3.0, float(ord("日")), 0.5, 0.5]
    assert [row.object for row in response.data] == ["embedding"] * 5
    assert (response.object, response.model) == ("list", "m")
    assert (response.usage.prompt_tokens, response.usage.total_tokens) == (5, 5)
    assert response.numpy().shape == (5, 4)
    assert response.numpy().dtype.name == "float32"
    assert response.numpy()[:, 0].tolist() == [1, 2, 3, 4, 1]
    assert len(response.individual_request_times) == len(response.response_headers) == 3
    assert 0 < max(response.individual_request_times) <= response.total_time < time.time() - began + 0.1
    assert response.response_headers[0]["content-type"] == "application/json"


def test_optional_fields_are_left_out(lib: ModuleType) -> None:
    with ScriptedServer(embeddings) as server:
        client(lib, server).embed(["a"], "m")
        assert server.requests[0].json == {"input": ["a"], "model": "m"}


@pytest.mark.parametrize("seed", range(4))
def test_splits_are_equal(lib: ModuleType, seed: int) -> None:
    """A rule that predicts both: close a group before it passes the number of items or of characters."""
    rng = random.Random(seed)
    inputs = [rng.choice("aé日😀") * rng.randrange(0, 70) for _ in range(rng.randrange(1, 60))]
    size, chars = rng.randrange(1, 9), rng.randrange(50, 120)
    with ScriptedServer(embeddings) as server:
        wanted = preference(lib, batch_size=size, max_chars_per_request=chars)
        response = client(lib, server).embed(inputs, "m", preference=wanted)
        sent = texts(server)
    expected: list[list[str]] = []
    for text in inputs:
        last = expected[-1] if expected else []
        if last and len(last) < size and sum(map(len, last)) + len(text) <= chars:
            last.append(text)
        else:
            expected.append([text])
    assert sent == expected
    assert response.numpy()[:, 0].tolist() == [len(text) for text in inputs]


def rerank_reply(request: Recorded) -> Reply:
    found = request.json["texts"]
    results = [{"index": i, "score": float(text), "text": text} for i, text in enumerate(found)]
    return Reply(sorted(results, key=lambda result: -float(result["score"])))


def test_rerank(lib: ModuleType) -> None:
    with ScriptedServer(rerank_reply) as server:
        wanted = preference(lib, batch_size=2)
        response = client(lib, server).rerank(
            "q", ["1", "5", "2", "4", "3"], model="m", return_text=True, truncate=True, preference=wanted
        )
        first = min(server.requests, key=batch_number)
        assert (first.method, first.path) == ("POST", "/rerank")
        assert first.json == {
            "query": "q",
            "texts": ["1", "5"],
            "model": "m",
            "raw_scores": False,
            "return_text": True,
            "truncate": True,
            "truncation_direction": "Right",
        }
    found = [(result.index, result.score, result.text) for result in response.data]
    assert found == [(1, 5.0, "5"), (0, 1.0, "1"), (3, 4.0, "4"), (2, 2.0, "2"), (4, 3.0, "3")]
    assert len(response.individual_request_times) == len(response.response_headers) == 3


def test_classify(lib: ModuleType) -> None:
    def handler(request: Recorded) -> Reply:
        return Reply([[{"label": text, "score": 0.5}] for (text,) in request.json["inputs"]])

    with ScriptedServer(handler) as server:
        response = client(lib, server).classify(
            ["a", "b", "c"], preference=preference(lib, batch_size=2), raw_scores=True
        )
        first = min(server.requests, key=batch_number)
        assert first.path == "/predict"
        assert first.json == {
            "inputs": [["a"], ["b"]],
            "raw_scores": True,
            "truncate": False,
            "truncation_direction": "Right",
        }
    assert [[(r.label, r.score) for r in group] for group in response.data] == [
        [("a", 0.5)],
        [("b", 0.5)],
        [("c", 0.5)],
    ]


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "GET"])
def test_batch_post(lib: ModuleType, method: str) -> None:
    payloads = [{"i": i, "nested": [None, True, "é"]} for i in range(5)]
    with ScriptedServer(lambda request: Reply({"echo": request.body.decode()})) as server:
        response = client(lib, server).batch_post(
            "x/y?z=1", payloads, preference=preference(lib), method=method
        )
        assert {(r.method, r.path) for r in server.requests} == {(method, "/x/y?z=1")}
        bodies = {batch_number(r): r.body for r in server.requests}
    if method == "GET":
        assert set(bodies.values()) == {b""}
    else:
        assert all(__import__("json").loads(bodies[i]) == payloads[i] for i in range(5))
    assert [value["echo"].encode() for value in response.data] == [bodies[i] for i in range(5)]


def test_batch_system_one(lib: ModuleType) -> None:
    with ScriptedServer(lambda request: Reply(request.json)) as server:
        body = {"state": "s", "questions": {"q": {"type": "choice"}}, "more": 1}
        response = client(lib, server).batch_system_one([body, {**body, "state": "t"}])
        assert {request.path for request in server.requests} == {"/v1/systemone"}
    assert [value["state"] for value in response.data] == ["s", "t"]


def test_extra_headers_replace_and_trace_context(lib: ModuleType) -> None:
    trace = lib.TraceContext("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "a=b")
    wanted = preference(
        lib, extra_headers={"X-A": "b", "Authorization": "zz", "User-Agent": "me"}, trace_context=trace
    )
    with ScriptedServer(embeddings) as server:
        client(lib, server).embed(["a"], "m", preference=wanted)
        headers = server.requests[0].headers
    assert headers["x-a"] == "b"
    assert headers["authorization"] == "zz"
    assert headers["user-agent"] == "me"
    assert headers["traceparent"] == trace.traceparent
    assert headers["tracestate"] == "a=b"


@pytest.mark.parametrize("suffix", ["", "/", "/a/b//"])
def test_base_url(lib: ModuleType, suffix: str) -> None:
    with ScriptedServer(embeddings) as server:
        lib.PerformanceClient(server.url + suffix, "KEY").embed(["a"], "m")
        assert server.requests[0].path == suffix.rstrip("/") + "/v1/embeddings"


@pytest.mark.parametrize("status", [408, 409, 429, 500, 501, 503, 504])
def test_retried_statuses(lib: ModuleType, status: int) -> None:
    """Soon, but not at once: of some calls, since this machine may stand still in one of them."""

    def handler(request: Recorded) -> Reply:
        return embeddings(request) if request.number % 2 else Reply({"error": "no"}, status=status)

    with ScriptedServer(handler) as server:
        for _ in range(3):
            assert len(client(lib, server).embed(["a"], "m", preference=preference(lib)).data) == 1
        assert len(server.requests) == 6
        at = [request.at for request in server.requests]
    waits = [again - first for first, again in zip(at[::2], at[1::2])]
    assert 0.05 <= min(waits) < 0.4


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 418, 422, 425])
def test_refused_statuses(lib: ModuleType, status: int) -> None:
    with ScriptedServer(lambda request: Reply({"error": "no"}, status=status)) as server:
        with pytest.raises(requests.exceptions.HTTPError) as caught:
            client(lib, server).embed(["a"], "m", preference=preference(lib))
        assert len(server.requests) == 1
    assert caught.value.args[0] == status
    assert '{"error": "no"}' in caught.value.args[1]
    assert len(caught.value.args) == 2


def test_backoff_grows_fourfold_and_retries_end(lib: ModuleType) -> None:
    with ScriptedServer(lambda request: Reply({"error": "no"}, status=503)) as server:
        for _ in range(3):
            with pytest.raises(requests.exceptions.HTTPError) as caught:
                client(lib, server).embed(["a"], "m", preference=preference(lib, max_retries=2))
            assert caught.value.args[0] == 503
        at = [request.at for request in server.requests]
    assert len(at) == 9
    first, second = ([at[i + k] - at[i + k - 1] for i in (0, 3, 6)] for k in (1, 2))
    assert 0.05 <= min(first) < 0.19  # this machine may stand still in one of the calls
    assert 0.20 <= min(second) < 0.39


def test_no_retries(lib: ModuleType) -> None:
    with ScriptedServer(lambda request: Reply(status=503)) as server:
        with pytest.raises(requests.exceptions.HTTPError):
            client(lib, server).embed(["a"], "m", preference=preference(lib, max_retries=0))
        assert len(server.requests) == 1


def test_non_retryable_status_codes(lib: ModuleType) -> None:
    with ScriptedServer(lambda request: Reply(status=503)) as server:
        with pytest.raises(requests.exceptions.HTTPError):
            client(lib, server).embed(
                ["a"], "m", preference=preference(lib, non_retryable_status_codes={503})
            )
        assert len(server.requests) == 1


def test_status_retries_are_not_in_the_retry_budget(lib: ModuleType) -> None:
    def handler(request: Recorded) -> Reply:
        return Reply(status=503) if request.number < 10 else embeddings(request)

    with ScriptedServer(handler) as server:
        wanted = preference(lib, batch_size=1, retry_budget_pct=0.0)
        response = client(lib, server).embed(["a"] * 10, "m", preference=wanted)
        assert len(server.requests) == 20
    assert len(response.data) == 10


def test_connections_are_kept(lib: ModuleType) -> None:
    with ScriptedServer(embeddings) as server:
        shared = lib.HttpClientWrapper()
        wanted = preference(lib, batch_size=1, max_concurrent_requests=3)
        for _ in range(2):
            user = lib.PerformanceClient(server.url, "KEY", client_wrapper=shared)
            user.embed(["a"] * 30, "m", preference=wanted)
        assert len(server.requests) == 60
        if lib.__name__ == "headrace.client":
            assert server.connections <= 3
        assert server.connections < 20  # racing connects of the original leave spare ones


@pytest.mark.parametrize(
    "body",
    [b"{nope", b"", b"<html>", b'{"data": [], "model": "m", "object": "list"}'],
    ids=["broken", "empty", "html", "no usage"],
)
def test_unreadable_replies_are_value_errors(lib: ModuleType, body: bytes) -> None:
    with ScriptedServer(lambda request: Reply(body)) as server:
        with pytest.raises(ValueError):
            client(lib, server).embed(["a"], "m", preference=preference(lib))
        assert len(server.requests) == 1


def test_null_in_a_vector_is_refused(lib: ModuleType) -> None:
    body = {
        "data": [{"object": "embedding", "index": 0, "embedding": [1.0, None]}],
        "model": "m",
        "object": "list",
        "usage": {"prompt_tokens": 1, "total_tokens": 1},
    }
    with ScriptedServer(lambda request: Reply(body)) as server, pytest.raises(ValueError):
        client(lib, server).embed(["a"], "m", preference=preference(lib))


@pytest.mark.parametrize("content_type", ["application/msgpack", "application/x-msgpack"])
def test_messagepack_replies(lib: ModuleType, content_type: str) -> None:
    import msgspec

    def handler(request: Recorded) -> Reply:
        reply = embeddings(request).body if request.path == "/v1/embeddings" else {"a": [1, 2.5, "é"]}
        return Reply(msgspec.msgpack.encode(reply), headers={"content-type": content_type})

    with ScriptedServer(handler) as server:
        user = client(lib, server)
        assert user.embed(["abc"], "m").numpy().tolist() == [[3.0, 97.0, 0.5, 0.5]]
        assert user.batch_post("/x", [1]).data == [{"a": [1, 2.5, "é"]}]


def test_ragged_vectors_have_no_array(lib: ModuleType) -> None:
    def handler(request: Recorded) -> Reply:
        return embeddings(request, dim=3 + batch_number(request))

    with ScriptedServer(handler) as server:
        response = client(lib, server).embed(["a", "b"], "m", preference=preference(lib, batch_size=1))
        assert [len(row.embedding) for row in response.data] == [3, 4]
        with pytest.raises(ValueError, match="same dimension"):
            response.numpy()


BAD_PREFERENCES: list[dict[str, Any]] = [
    {"max_concurrent_requests": 0},
    {"max_concurrent_requests": 1025},
    {"max_concurrent_requests": 513},
    {"batch_size": 0},
    {"batch_size": 1025},
    {"max_chars_per_request": 49},
    {"max_chars_per_request": 1_048_577},
    {"timeout_s": 0.05},
    {"timeout_s": 3601},
    {"timeout_s": math.nan},
    {"hedge_delay": 0.01},
    {"hedge_delay": 30.0},
    {"total_timeout_s": 1.0},
    {"hedge_budget_pct": -1.0},
    {"hedge_budget_pct": 3.1},
    {"retry_budget_pct": 3.1},
    {"max_retries": 7},
    {"initial_backoff_ms": 49},
    {"initial_backoff_ms": 45_001},
    {"primary_api_key_override": ""},
]


@pytest.mark.parametrize("fields", BAD_PREFERENCES, ids=str)
def test_preferences_out_of_range(lib: ModuleType, fields: dict[str, Any]) -> None:
    with ScriptedServer(embeddings) as server:
        with pytest.raises(ValueError):
            client(lib, server).embed(["a"], "m", preference=preference(lib, **fields))
        assert not server.requests


def test_defaults(lib: ModuleType) -> None:
    default = lib.RequestProcessingPreference.default()
    expected = {
        "max_concurrent_requests": 256,
        "batch_size": 8,
        "max_chars_per_request": 8000,
        "pin_initial_endpoint_once": False,
        "timeout_s": 3600.0,
        "hedge_delay": None,
        "total_timeout_s": None,
        "hedge_budget_pct": 0.10,
        "retry_budget_pct": 0.05,
        "max_retries": 5,
        "initial_backoff_ms": 125,
        "cancel_token": None,
        "primary_api_key_override": None,
        "extra_headers": None,
        "non_retryable_status_codes": set(),
        "trace_context": None,
    }
    assert {name: getattr(default, name) for name in expected} == expected
    positional = lib.RequestProcessingPreference(3, 4, 5.5, 600, True)
    assert positional.max_concurrent_requests == 3
    assert positional.batch_size == 4
    assert positional.timeout_s == 5.5
    assert positional.max_chars_per_request == 600
    assert positional.pin_initial_endpoint_once is True


def test_arguments(lib: ModuleType) -> None:
    with ScriptedServer(embeddings) as server:
        user = client(lib, server)
        calls: list[tuple[type[Exception], Any]] = [
            (ValueError, lambda: user.embed([], "m")),
            (ValueError, lambda: user.embed(["a"], "")),
            (TypeError, lambda: user.embed("abc", "m")),
            (TypeError, lambda: user.embed(["a", 1], "m")),
            (TypeError, lambda: user.embed(iter(["a"]), "m")),
            (ValueError, lambda: user.rerank("q", [])),
            (ValueError, lambda: user.classify([])),
            (ValueError, lambda: user.batch_post("/x", [])),
            (ValueError, lambda: user.batch_post("/x", [object()])),
            (ValueError, lambda: user.batch_post("/x", [1], method="FOO")),
            (ValueError, lambda: user.batch_post("/x", [1], method="get")),
            (ValueError, lambda: user.batch_system_one([])),
        ]
        for error, call in calls:
            with pytest.raises(error):
                call()
        assert not server.requests


def test_api_key_from_the_environment(lib: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEADRACE_API_KEY", "BASETEN_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="BASETEN_API_KEY"):
        lib.PerformanceClient("http://x")
    monkeypatch.setenv("OPENAI_API_KEY", "o")
    assert lib.PerformanceClient("http://x").api_key == "o"
    monkeypatch.setenv("BASETEN_API_KEY", "b")
    assert lib.PerformanceClient("http://x").api_key == "b"


def test_request_id_prefix(lib: ModuleType) -> None:
    assert lib.PerformanceClient("http://x", "k").get_client_wrapper() is not None
    with pytest.raises(ValueError):
        lib.PerformanceClient("http://x", "k", proxy="bad bad")


def test_weights_and_health(lib: ModuleType) -> None:
    """Weights 3 and 1 share 16 requests as 12 and 4; a dead endpoint gets none until it is back."""
    sick = threading.Event()

    def handler(request: Recorded) -> Reply:
        if request.path.endswith("/health"):
            return Reply({}, status=503 if sick.is_set() and request.path == "/b/health" else 200)
        return embeddings(request)

    with ScriptedServer(handler) as one, ScriptedServer(handler) as two:
        wrapper = lib.HttpClientWrapper()
        often = {"health_check_interval_s": 0.1, "health_check_timeout_s": 30.0, "health_check_retries": 0}
        a = lib.Endpoint(one.url, "HEALTH-A", wrapper, **often)
        b = lib.Endpoint(two.url, "HEALTH-B", wrapper, deployment_health_path="/b/health", **often)
        user = lib.PerformanceClient(
            "http://unused", "KEY", endpoint_pool=lib.EndpointPool([a, b], [3.0, 1.0])
        )
        wanted = preference(lib, batch_size=1, max_concurrent_requests=1)

        def shares() -> tuple[int, int]:
            before = [sum(r.method == "POST" for r in s.requests) for s in (one, two)]
            assert len(user.embed(["a"] * 16, "m", preference=wanted).data) == 16
            after = [sum(r.method == "POST" for r in s.requests) for s in (one, two)]
            return after[0] - before[0], after[1] - before[1]

        def checks(server: ScriptedServer) -> int:
            return sum(r.method == "GET" for r in server.requests)

        assert two.wait_for(lambda: checks(two) >= 2)
        assert shares() == (12, 4) if lib.__name__ == "headrace.client" else sum(shares()) == 16
        assert {r.headers["authorization"] for r in one.requests if r.method == "GET"} == {"Bearer HEALTH-A"}
        assert {r.headers["authorization"] for r in one.requests if r.method == "POST"} == {"Bearer KEY"}
        sick.set()
        seen = checks(two)
        assert two.wait_for(lambda: checks(two) >= seen + 3)
        assert shares() == (16, 0)
        sick.clear()
        seen = checks(two)
        assert two.wait_for(lambda: checks(two) >= seen + 3)
        assert shares()[1] > 0


def test_endpoint_arguments(lib: ModuleType) -> None:
    wrapper = lib.HttpClientWrapper()
    endpoint = lib.Endpoint("http://127.0.0.1:9", "k", wrapper)
    for call in (
        lambda: lib.EndpointPool([]),
        lambda: lib.EndpointPool([endpoint], [1.0, 2.0]),
        lambda: lib.EndpointPool([endpoint], [-1.0]),
        lambda: lib.EndpointPool([endpoint], [0.0]),
        lambda: lib.EndpointPool([endpoint], [math.nan]),
        lambda: lib.Endpoint("http://x", "k", wrapper, health_check_interval_s=0.0),
    ):
        with pytest.raises(ValueError):
            call()


@pytest.mark.parametrize("method", ["embed", "rerank", "classify", "batch_post", "batch_system_one"])
def test_async_twins(lib: ModuleType, method: str) -> None:
    import asyncio

    arguments: dict[str, tuple[Any, ...]] = {
        "embed": (["a", "b"], "m"),
        "rerank": ("q", ["1", "2"]),
        "classify": (["a", "b"],),
        "batch_post": ("/x", [1, 2]),
        "batch_system_one": ([{"state": 1}, {"state": 2}],),
    }

    def handler(request: Recorded) -> Reply:
        if request.path == "/rerank":
            return rerank_reply(request)
        if request.path == "/predict":
            return Reply([[{"label": "x", "score": 1.0}] for _ in request.json["inputs"]])
        return embeddings(request) if request.path == "/v1/embeddings" else Reply({"ok": True})

    async def go(user: Any) -> Any:
        return await getattr(user, "async_" + method)(*arguments[method])

    with ScriptedServer(handler) as server:
        assert len(asyncio.run(go(client(lib, server))).data) == 2
        assert len(asyncio.run(go(client(lib, server))).data) == 2  # another event loop, the same pool
