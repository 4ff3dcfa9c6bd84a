"""Chat and completions in bulk; streams of embeddings; the adaptive limit."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from headrace.client import (
    BadReply,
    HTTPError,
    InvalidArgument,
    PerformanceClient,
    RequestProcessingPreference,
)
from headrace.client.chat import EventStream
from headrace.client.limiter import AdaptiveLimit
from support.scripted_server import Recorded, Reply, ScriptedServer, embeddings


def preference(**fields: Any) -> RequestProcessingPreference:
    return RequestProcessingPreference(**{"timeout_s": 30.0, "initial_backoff_ms": 50, **fields})


def whole(request: Recorded) -> dict[str, Any]:
    body = request.json
    said = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
    choice = {"index": 0, "finish_reason": "stop", "logprobs": None}
    if "messages" in body:
        choice["message"] = {"role": "assistant", "content": f"echo {said}"}
    else:
        choice["text"] = f"echo {said}"
    kind = "chat.completion" if "messages" in body else "text_completion"
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    return {"id": "x", "object": kind, "model": body["model"], "choices": [choice], "usage": usage}


def events(reply: dict[str, Any]) -> bytes:
    """The same reply as a stream of one character a chunk."""
    choice = reply["choices"][0]
    chat = "message" in choice
    text = choice["message"]["content"] if chat else choice["text"]
    parts: list[dict[str, Any]] = [{"delta": {"role": "assistant", "content": ""}}] if chat else []
    parts += [{"delta": {"content": c}} if chat else {"text": c} for c in text]
    parts.append({"delta": {}, "finish_reason": "stop"} if chat else {"text": "", "finish_reason": "stop"})
    kind = reply["object"] + (".chunk" if chat else "")
    base = {"id": "x", "object": kind, "model": reply["model"]}
    chunks = [{**base, "choices": [{"index": 0, "finish_reason": None, **part}]} for part in parts]
    chunks.append({**base, "choices": [], "usage": reply["usage"]})
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return "".join([": ping\n\n", *lines, "data: [DONE]\n\n"]).encode()


def handler(request: Recorded) -> Reply:
    reply = whole(request)
    if not request.json.get("stream"):
        return Reply(reply)
    body = events(reply)
    rng = random.Random(request.number)
    cuts = sorted(rng.sample(range(1, len(body)), 5))
    pieces = [body[a:b] for a, b in itertools.pairwise([0, *cuts, len(body)])]
    return Reply(chunks=pieces, headers={"content-type": "text/event-stream"})


@pytest.mark.parametrize("stream", [False, True])
def test_chat(stream: bool) -> None:
    asked: list[Any] = [
        "hé",
        [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        {"model": "other", "messages": [{"role": "user", "content": "b"}], "temperature": 1},
    ]
    with ScriptedServer(handler) as server:
        answers = PerformanceClient(server.url, "k").chat(asked, "m", stream=stream, temperature=0)
        bodies = {b["messages"][-1]["content"]: b for b in (r.json for r in server.requests)}
    assert [answer.text for answer in answers] == ["echo hé", "echo u", "echo b"]
    assert [answer.body["model"] for answer in answers] == ["m", "m", "other"]
    assert [bodies[text]["temperature"] for text in ("hé", "u", "b")] == [0, 0, 1]
    assert answers[0].usage == {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    assert {answer.finish_reason for answer in answers} == {"stop"}
    assert all((answer.first_token_s is not None) == stream for answer in answers)
    assert answers[0].body["object"] == "chat.completion"


@pytest.mark.parametrize("stream", [False, True])
def test_completions_async(stream: bool) -> None:
    with ScriptedServer(handler) as server:
        client = PerformanceClient(server.url, "k")
        answers = asyncio.run(client.async_completions(["a", "b"], "m", stream=stream))
    assert [answer.text for answer in answers] == ["echo a", "echo b"]


def test_streams_cut_at_every_byte() -> None:
    request = Recorded(
        0, "POST", "/", {}, b'{"model":"m","messages":[{"content":"\xc3\xa9t\xc3\xa9"}]}', 0, 0
    )
    body = events(whole(request))
    for cut in range(len(body)):
        sink = EventStream()
        sink.feed(body[:cut])
        sink.feed(body[cut:])
        assert sink.complete
        assert sink.result()["choices"][0]["message"]["content"] == "echo été"


def test_tool_calls_and_logprobs_are_put_together() -> None:
    sink = EventStream()
    first = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}}
    more = [{"index": 0, "function": {"arguments": part}} for part in ('{"a"', ": 1}")]
    second = {"index": 1, "id": "c2", "type": "function", "function": {"name": "g", "arguments": "{}"}}
    for call in (first, *more, second):
        chunk = {"choices": [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}]}
        sink.feed(b"data: " + json.dumps(chunk).encode() + b"\r\n\r\n")
    for token in "xy":
        part = {
            "index": 0,
            "delta": {"reasoning_content": token},
            "logprobs": {"content": [{"token": token}]},
        }
        sink.feed(b"data:" + json.dumps({"choices": [part]}).encode() + b"\n\n")
    choice = sink.result()["choices"][0]
    assert [call["function"] for call in choice["message"]["tool_calls"]] == [
        {"name": "f", "arguments": '{"a": 1}'},
        {"name": "g", "arguments": "{}"},
    ]
    assert choice["message"]["reasoning_content"] == "xy"
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["x", "y"]
    assert not sink.complete


def test_a_stream_that_breaks_off_is_asked_for_again() -> None:
    def broken(request: Recorded) -> Reply:
        if request.number == 0:
            return Reply(chunks=[events(whole(request))[:200]])
        return handler(request)

    with ScriptedServer(broken) as server:
        answers = PerformanceClient(server.url, "k").chat(["a"], "m", preference(), stream=True)
        assert len(server.requests) == 2
    assert answers[0].text == "echo a"


def test_errors_raised_or_returned() -> None:
    def some(request: Recorded) -> Reply:
        if "bad" in request.body.decode():
            return Reply({"error": "no"}, status=400)
        if "odd" in request.body.decode():
            return Reply({"choices": []})
        return handler(request)

    with ScriptedServer(some) as server:
        client = PerformanceClient(server.url, "k")
        with pytest.raises(HTTPError):
            client.chat(["a", "bad"], "m")
        answers = client.chat(["a", "bad", "odd", "b"], "m", return_errors=True)
        with pytest.raises(InvalidArgument):
            client.chat(["a"])
        with pytest.raises(InvalidArgument):
            client.chat([{"model": "m", "messages": [{}], "stream": True}])
    assert [answer.index for answer in answers] == [0, 1, 2, 3]
    assert [type(answer.error) for answer in answers] == [type(None), HTTPError, BadReply, type(None)]
    with pytest.raises(HTTPError):
        _ = answers[1].text


def test_an_error_event_in_a_stream() -> None:
    def failing(request: Recorded) -> Reply:
        return Reply(b'data: {"error": {"message": "boom"}}\n\ndata: [DONE]\n\n')

    with ScriptedServer(failing) as server, pytest.raises(BadReply, match="boom"):
        PerformanceClient(server.url, "k").chat(["a"], "m", stream=True)


def test_a_server_with_room_for_three() -> None:
    """Answers 429 above 3 requests in flight: all are answered, and the limit comes down near 3."""
    server = ScriptedServer(lambda request: Reply())

    def crowded(request: Recorded) -> Reply:
        if server.in_flight > 3:
            return Reply({"error": "full"}, status=429)
        return Reply(whole(request), delay=0.01)

    server._handler = crowded
    with server:
        client = PerformanceClient(server.url, "k")
        answers = client.chat([str(i) for i in range(150)], "m", preference(max_concurrent_requests=64))
        refused = len(server.requests) - 150
    assert [answer.text for answer in answers] == [f"echo {i}" for i in range(150)]
    assert refused < 150  # 64 workers without a limit are refused many hundred times


def test_the_limit_grows_shrinks_and_keeps_its_bounds() -> None:
    async def go() -> None:
        limit = AdaptiveLimit(start=4, high=32)
        limit.active = 32
        for _ in range(2000):
            limit.saw(200, 0.01)
        assert limit.limit == 32
        for _ in range(50):
            limit._not_before = 0.0
            limit.saw(429, 0.01)
        assert limit.limit == 1
        for _ in range(3):
            limit.saw(429, 0.01)  # a burst counts once a round trip
        limit.limit = 16.0
        limit.active = 16
        for _ in range(100):
            limit.saw(200, 1.0)  # a hundred times the best latency
        assert limit.limit < 16
        limit.active = 0
        order: list[int] = []

        async def one(i: int) -> None:
            async with limit:
                order.append(i)
                assert limit.active <= int(limit.limit)
                await asyncio.sleep(0)

        await asyncio.gather(*(one(i) for i in range(100)))
        assert sorted(order) == list(range(100))
        assert limit.active == 0

    asyncio.run(go())


def test_embed_stream_in_constant_memory() -> None:
    """Inputs are taken as they are needed, and replies are not kept."""
    taken = 0

    def texts() -> Iterator[str]:
        nonlocal taken
        for i in range(20_000):
            taken = i
            yield "x" * (i % 50)

    with ScriptedServer(lambda request: embeddings(request, dim=64)) as server:
        client = PerformanceClient(server.url, "k")
        wanted = preference(batch_size=100, max_concurrent_requests=2)
        seen, furthest = 0, 0
        tracemalloc.start()
        for part in client.embed_stream(texts(), "m", preference=wanted):
            table = part.numpy()
            assert part.data[0].index == seen
            assert table[:, 0].tolist() == [i % 50 for i in range(seen, seen + len(table))]
            seen += len(table)
            furthest = max(furthest, taken - seen)
            server.requests.clear()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert seen == 20_000
    assert furthest < 20_000
    assert peak < 60_000_000


def test_leaving_a_stream_early_stops_it() -> None:
    with ScriptedServer(embeddings) as server:
        client = PerformanceClient(server.url, "k")
        wanted = preference(batch_size=1, max_concurrent_requests=4)
        for part in client.embed_stream(map(str, itertools.count()), "m", preference=wanted):
            if part.data[0].index >= 10:
                break
        assert server.wait_for(lambda: server.in_flight == 0)
        server.settle()  # what was on its way has arrived
        sent = len(server.requests)
        assert sent < 1000
        time.sleep(0.2)
        server.settle()
        assert len(server.requests) == sent
        assert server.in_flight == 0

        async def go() -> None:
            stream = client.async_embed_stream(map(str, itertools.count()), "m", preference=wanted)
            async for part in stream:
                if part.data[0].index >= 10:
                    break
            await stream.aclose()

        asyncio.run(go())
        assert server.wait_for(lambda: server.in_flight == 0)


def test_an_error_in_the_callers_iterator() -> None:
    def texts() -> Iterator[str]:
        yield "a"
        raise KeyError("mine")

    with ScriptedServer(embeddings) as server:
        client = PerformanceClient(server.url, "k")
        with pytest.raises(KeyError, match="mine"):
            list(client.embed_stream(texts(), "m"))
        with pytest.raises(TypeError):
            list(client.embed_stream(["a", 1], "m"))  # type: ignore[list-item]
        assert list(client.embed_stream([], "m")) == []


def test_classify_stream() -> None:
    def labels(request: Recorded) -> Reply:
        return Reply([[{"label": text, "score": 1.0}] for (text,) in request.json["inputs"]])

    with ScriptedServer(labels) as server:
        groups = list(PerformanceClient(server.url, "k").classify_stream(str(i) for i in range(100)))
    assert [group[0].label for group in groups] == [str(i) for i in range(100)]
