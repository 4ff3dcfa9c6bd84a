"""Faults, time limits, hedges and redirects: both clients do the same, driven against one scripted server."""

from __future__ import annotations

import math
import random
import time
from types import ModuleType
from typing import Any

import pytest
import requests

from support.clients import client, preference
from support.scripted_server import Recorded, Reply, ScriptedServer, closed_port, embeddings


@pytest.mark.parametrize("fault", ["reset", "close"])
def test_network_fault_once(lib: ModuleType, fault: str) -> None:
    def handler(request: Recorded) -> Reply:
        return embeddings(request) if request.number else Reply(fault=fault)

    with ScriptedServer(handler) as server:
        response = client(lib, server).embed(["a"], "m", preference=preference(lib))
        assert len(server.requests) == 2
    assert len(response.data) == 1


def test_network_faults_spend_the_budget(lib: ModuleType) -> None:
    """One request: the first retry is free, then the least budget of 2; so 4 attempts."""
    with ScriptedServer(lambda request: Reply(fault="reset")) as server:
        with pytest.raises(ValueError):
            client(lib, server).embed(["a"], "m", preference=preference(lib))
        assert len(server.requests) == 4


def test_nobody_listens(lib: ModuleType) -> None:
    with closed_port() as port:
        nobody = lib.PerformanceClient(f"http://127.0.0.1:{port}", "KEY")
        with pytest.raises(ValueError):
            nobody.embed(["a"], "m", preference=preference(lib))


def test_timeout_is_retried_then_raised(lib: ModuleType) -> None:
    with ScriptedServer(lambda request: Reply(fault="silent")) as server:
        with pytest.raises(requests.exceptions.Timeout) as caught:
            client(lib, server).embed(["a"], "m", preference=preference(lib, timeout_s=0.3))
        server.settle()
        assert server.connections == 3  # on a slow machine the time may be over before a request is written
        assert len(server.requests) <= 3
        assert server.wait_for(lambda: all(request.gone for request in server.requests))
    assert caught.value.args[0] == 408
    assert caught.value.args[1].startswith("Remote timeout")


def test_timeout_once(lib: ModuleType) -> None:
    def handler(request: Recorded) -> Reply:
        return embeddings(request) if request.number else Reply(fault="silent")

    with ScriptedServer(handler) as server:
        # Answers that are late on a slow machine are asked for again, too: there is budget for it.
        wanted = preference(lib, timeout_s=0.5, batch_size=1, retry_budget_pct=3.0)
        assert len(client(lib, server).embed(["a", "b"], "m", preference=wanted).data) == 2


def test_total_timeout(lib: ModuleType) -> None:
    """The second request has only what the first one left: its own time limit would be as long as the whole."""

    def handler(request: Recorded) -> Reply:
        return Reply(fault="silent") if request.number else Reply(embeddings(request).body, delay=0.5)

    with ScriptedServer(handler) as server:
        wanted = preference(lib, timeout_s=0.9, total_timeout_s=0.9, batch_size=1, max_concurrent_requests=1)
        begun = time.monotonic()
        with pytest.raises(requests.exceptions.Timeout) as caught:
            client(lib, server).embed(["a"] * 10, "m", preference=wanted)
        assert time.monotonic() - begun > 0.85
        server.settle()
        assert len(server.requests) <= 2
        if lib.__name__ == "headrace.client":
            assert all(int(late.headers["request-timeout-ms"]) <= 401 for late in server.requests[1:])
    assert caught.value.args[0] == 408
    assert caught.value.args[1].startswith("Local timeout")


def test_hedge_wins(lib: ModuleType) -> None:
    """The first is never answered, and nothing is asked again."""

    def handler(request: Recorded) -> Reply:
        return embeddings(request) if request.number else Reply(fault="silent")

    with ScriptedServer(handler) as server:
        begun = time.monotonic()
        wanted = preference(lib, hedge_delay=0.1, timeout_s=10.0, max_retries=0)
        response = client(lib, server).embed(["a"], "m", preference=wanted)
        first, copy = server.requests
        assert first.body == copy.body
        assert copy.at - begun > 0.09
        assert server.wait_for(lambda: first.gone)  # the loser is cancelled
    assert len(response.data) == 1


@pytest.mark.parametrize(("share", "copies"), [(0.1, 2), (0.0, 0), (0.35, 5)])
def test_hedge_budget(lib: ModuleType, share: float, copies: int) -> None:
    """Nobody is answered before all copies are there, and a while: for one too many."""
    assert copies == (1 + math.ceil(10 * share) if share else 0)

    def handler(request: Recorded) -> Reply:
        return Reply(embeddings(request).body, when=lambda: len(server.requests) >= 10 + copies, delay=0.3)

    with ScriptedServer(handler) as server:
        wanted = preference(lib, batch_size=1, hedge_delay=0.1, hedge_budget_pct=share)
        response = client(lib, server).embed(["a"] * 10, "m", preference=wanted)
        assert len(server.requests) == 10 + copies
    assert [row.index for row in response.data] == list(range(10))


def test_concurrency_is_bounded(lib: ModuleType) -> None:
    """Nobody is answered before seven wait, and a while: for an eighth."""

    def handler(request: Recorded) -> Reply:
        return Reply(embeddings(request).body, when=lambda: server.peak >= 7, delay=0.02)

    with ScriptedServer(handler) as server:
        wanted = preference(lib, batch_size=1, max_concurrent_requests=7)
        client(lib, server).embed(["a"] * 40, "m", preference=wanted)
        assert server.peak == 7


def found_elsewhere(request: Recorded) -> Reply:
    """An answer whatever the method: what a GET would find."""
    data = [{"object": "embedding", "index": 0, "embedding": [1.0]}]
    usage = {"prompt_tokens": 1, "total_tokens": 1}
    return Reply({"object": "list", "data": data, "model": request.method, "usage": usage})


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("where", ["/else/where?x=1", "where", "?x=1"])
def test_redirects(lib: ModuleType, status: int, where: str) -> None:
    """307 and 308 keep method and body; the others become a GET without one."""

    def handler(request: Recorded) -> Reply:
        return (
            found_elsewhere(request) if request.number else Reply(status=status, headers={"location": where})
        )

    with ScriptedServer(handler) as server:
        response = client(lib, server).embed(["a"], "m", preference=preference(lib))
        first, second = server.requests
    assert second.path == {"w": "/v1/where", "?": "/v1/embeddings?x=1", "/": where}[where[0]]
    assert response.model == second.method == ("POST" if status > 303 else "GET")
    assert second.body == (first.body if status > 303 else b"")
    assert second.headers["authorization"] == "Bearer KEY"
    assert ("content-type" in second.headers) == (status > 303)


def test_redirects_to_another_host_lose_the_key(lib: ModuleType) -> None:
    with ScriptedServer(found_elsewhere) as other:
        back = Reply(status=307, headers={"location": other.url + "/v1/x"})
        with ScriptedServer(lambda request: back) as server:
            wanted = preference(lib, extra_headers={"cookie": "a=b", "x-other": "kept"})
            client(lib, server).embed(["a"], "m", preference=wanted)
            assert server.requests[0].headers["cookie"] == "a=b"
        (request,) = other.requests
    assert request.body
    assert request.headers["host"] == other.url.removeprefix("http://")
    assert "authorization" not in request.headers
    assert "cookie" not in request.headers
    assert request.headers["x-other"] == "kept"


def test_redirects_that_end_nowhere(lib: ModuleType) -> None:
    """Ten are followed; that is a network fault then, so its first retry is free."""
    with ScriptedServer(lambda request: Reply(status=308, headers={"location": "/x"})) as server:
        with pytest.raises(ValueError):
            client(lib, server).embed(["a"], "m", preference=preference(lib, max_retries=1))
        assert len(server.requests) == 22


@pytest.mark.parametrize("headers", [{}, {"location": "http://"}, {"location": "http://[x/"}], ids=str)
def test_redirects_without_an_address(lib: ModuleType, headers: dict[str, str]) -> None:
    with ScriptedServer(lambda request: Reply(status=302, headers=headers)) as server:
        with pytest.raises(requests.exceptions.HTTPError) as caught:
            client(lib, server).embed(["a"], "m", preference=preference(lib))
        assert caught.value.args[0] == 302
        assert len(server.requests) == 1


def outcome(lib: ModuleType, script: list[Reply], wanted: dict[str, Any]) -> tuple[Any, int]:
    """What a call of one request ends with, and how often it is sent, when the server answers as the script says
    and well afterwards."""
    replies = iter(script)
    with ScriptedServer(lambda request: next(replies, None) or embeddings(request)) as server:
        try:
            found = client(lib, server).embed(["abc"], "m", preference=preference(lib, **wanted))
            result: Any = found.numpy().tolist()
        except requests.exceptions.RequestException as error:
            result = type(error).__name__, error.args[0]
        except ValueError:
            result = "ValueError"
        return result, len(server.requests)


@pytest.mark.parametrize("seed", range(12))
def test_any_script_has_the_same_outcome(seed: int) -> None:
    """Faults at random, in any order: both send the request as often and end alike.

    (Each on a new connection: of a kept one that dies, ours sends the request again without counting that.)
    """
    original = pytest.importorskip("baseten_performance_client")
    import headrace.client as ours

    rng = random.Random(seed)
    faults = [Reply(status=status, close=True) for status in (408, 409, 429, 500, 502, 503)]
    faults += [Reply(fault="reset"), Reply(fault="close"), Reply(fault="silent")]
    fatal = [Reply(status=400), Reply({"error": "no"}, status=401), Reply(b"{nope"), Reply(status=304)]
    script = [rng.choice(faults) for _ in range(rng.choice((1, 2, 2, 3)))]
    script += [rng.choice(fatal) for _ in range(rng.random() < 0.3)]
    wanted = {
        "timeout_s": 1.0,
        "max_retries": rng.choice((1, 2, 5)),
        "retry_budget_pct": rng.choice((0.0, 0.05, 3.0)),
        "non_retryable_status_codes": rng.choice((set(), {502}, {409, 503})),
    }
    assert outcome(ours, script, wanted) == outcome(original, script, wanted)


def test_slow_and_chunked_bodies(lib: ModuleType) -> None:
    import json

    def handler(request: Recorded) -> Reply:
        body = json.dumps(embeddings(request).body).encode()
        return Reply(chunks=[body[i : i + 9] for i in range(0, len(body), 9)], pause=0.005)

    with ScriptedServer(handler) as server:
        response = client(lib, server).embed(["x" * n for n in range(20)], "m", preference=preference(lib))
        assert response.numpy()[:, 0].tolist() == list(range(20))


def test_hedged_requests_are_counted_once(lib: ModuleType) -> None:
    """Every request is hedged and both copies answer at nearly the same time: nothing is doubled in the result."""

    def handler(request: Recorded) -> Reply:
        def copied() -> bool:
            return sum(request.body == other.body for other in server.requests) == 2

        return Reply(embeddings(request).body, when=copied, delay=0.06)

    with ScriptedServer(handler) as server:
        wanted = preference(lib, batch_size=2, hedge_delay=0.1, hedge_budget_pct=3.0)
        response = client(lib, server).embed(["x" * n for n in range(40)], "m", preference=wanted)
        assert len(server.requests) == 40
    assert response.numpy()[:, 0].tolist() == list(range(40))
    assert response.usage.total_tokens == 40
