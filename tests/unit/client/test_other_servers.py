"""Replies in the shapes of other servers, with all the fields that those send beside what is read."""

from __future__ import annotations

import base64
import struct
from typing import Any

import pytest

from headrace.client import HTTPError, PerformanceClient, RequestProcessingPreference
from support.scripted_server import Recorded, Reply, ScriptedServer


def openai_embeddings(request: Recorded) -> Reply:
    assert request.json["encoding_format"] == "base64"
    vectors = [base64.b64encode(struct.pack("<2f", len(t), 0.5)).decode() for t in request.json["input"]]
    rows = [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(vectors)]
    usage = {"prompt_tokens": 8, "total_tokens": 8}
    body = {"object": "list", "data": rows, "model": "text-embedding-3-small", "usage": usage}
    head = {"openai-processing-ms": "25", "x-ratelimit-remaining-requests": "9999", "Set-Cookie": "a=b"}
    return Reply(body, headers=head)


def vllm_embeddings(request: Recorded) -> Reply:
    rows = [
        {"index": i, "object": "embedding", "embedding": [len(t), 0.5]}
        for i, t in enumerate(request.json["input"])
    ]
    usage = {"prompt_tokens": 8, "total_tokens": 8, "completion_tokens": 0, "prompt_tokens_details": None}
    more = {"id": "embd-1", "created": 1760000000}
    return Reply({**more, "object": "list", "model": "m", "data": rows, "usage": usage})


def vllm_bytes(request: Recorded) -> Reply:
    import json

    assert request.json["encoding_format"] == "bytes"
    texts = request.json["input"]
    places = [
        {
            "index": i,
            "embed_dtype": "float32",
            "endianness": "native",
            "start": 8 * i,
            "end": 8 * i + 8,
            "shape": [2],
        }
        for i in range(len(texts))
    ]
    about = {"id": "embd-1", "created": 1, "model": "m", "data": places}
    about["usage"] = {"prompt_tokens": 8, "total_tokens": 8}
    body = b"".join(struct.pack("<2f", len(t), 0.5) for t in texts)
    return Reply(body, headers={"content-type": "application/octet-stream", "metadata": json.dumps(about)})


@pytest.mark.parametrize(
    ("handler", "form"), [(openai_embeddings, "base64"), (vllm_embeddings, None), (vllm_bytes, "bytes")]
)
def test_embeddings(handler: Any, form: str | None) -> None:
    with ScriptedServer(handler) as server:
        wanted = RequestProcessingPreference(batch_size=3)
        response = PerformanceClient(server.url, "k").embed(
            ["a", "bb", "ccc", ""], "m", form, None, None, wanted
        )
    assert response.numpy().tolist() == [[1, 0.5], [2, 0.5], [3, 0.5], [0, 0.5]]
    assert response.usage.total_tokens == 16


def test_tei() -> None:
    def handler(request: Recorded) -> Reply:
        if request.path == "/rerank":
            found = [{"index": i, "score": len(t)} for i, t in enumerate(request.json["texts"])]
            return Reply(sorted(found, key=lambda row: -int(row["score"])), headers={"x-compute-type": "gpu"})
        rows = [[{"score": 0.9, "label": "a"}, {"score": 0.1, "label": t}] for (t,) in request.json["inputs"]]
        return Reply(rows)

    with ScriptedServer(handler) as server:
        client = PerformanceClient(server.url, "k")
        assert [(r.index, r.text) for r in client.rerank("q", ["a", "ccc", "bb"]).data] == [
            (1, None),
            (2, None),
            (0, None),
        ]
        assert [g[1].label for g in client.classify(["x", "y"]).data] == ["x", "y"]


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (422, {"error": "Input validation error", "error_type": "Validation"}, "Input validation"),
        (404, {"object": "error", "message": "no model", "type": "NotFoundError", "code": 404}, "no model"),
        (
            401,
            {"error": {"message": "Incorrect API key", "type": "invalid_request_error"}},
            "Incorrect API key",
        ),
        (413, b"<html>413 Payload Too Large</html>", "Payload Too Large"),
    ],
)
def test_errors_say_what_the_server_said(status: int, body: Any, told: str) -> None:
    with ScriptedServer(lambda request: Reply(body, status=status)) as server:
        with pytest.raises(HTTPError, match=told) as caught:
            PerformanceClient(server.url, "k").embed(["a"], "m")
        assert caught.value.response.status_code == status


@pytest.mark.parametrize("server_kind", ["openai", "vllm", "llama.cpp"])
def test_chat(server_kind: str) -> None:
    """Extra fields, null contents, reasoning, and usage of details; whole and streamed."""
    import json

    usage: dict[str, Any] = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    message: dict[str, Any] = {"role": "assistant", "content": "Hi you", "refusal": None, "annotations": []}
    more: dict[str, Any] = {"id": "c", "created": 1, "model": "m", "system_fingerprint": None}
    if server_kind == "openai":
        usage["prompt_tokens_details"] = {"cached_tokens": 0, "audio_tokens": 0}
    if server_kind == "vllm":
        message["reasoning_content"] = None
        more["prompt_logprobs"] = None
    if server_kind == "llama.cpp":
        more["timings"] = {"prompt_n": 1}

    def handler(request: Recorded) -> Reply:
        if not request.json.get("stream"):
            choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
            return Reply({**more, "object": "chat.completion", "choices": [choice], "usage": usage})
        chunk = {**more, "object": "chat.completion.chunk"}
        events: list[Any] = [
            {
                "choices": [
                    {"index": 0, "delta": {"role": "assistant", "content": None}, "finish_reason": None}
                ]
            },
            {"choices": [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": None}]},
            {"choices": [{"index": 0, "delta": {"content": " you"}, "finish_reason": None}], "usage": None},
            {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
            {"choices": [], "usage": usage},
        ]
        lines = [b": ping\r\n\r\n"] + [b"data: %s\n\n" % json.dumps(chunk | e).encode() for e in events]
        return Reply(chunks=[*lines, b"data: [DONE]\n\n"], headers={"content-type": "text/event-stream"})

    with ScriptedServer(handler) as server:
        for stream in (False, True):
            (answer,) = PerformanceClient(server.url, "k").chat(["a"], "m", stream=stream)
            assert (answer.text, answer.finish_reason) == ("Hi you", "stop")
            assert answer.usage == usage
