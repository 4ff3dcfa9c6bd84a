"""Whatever is wrong gets a 4xx in OpenAI's shape that names the field, and nothing of it reaches the engine."""

from __future__ import annotations

import gzip
import http.client
import json
import socket
import zlib
from collections.abc import Iterator
from typing import Any

import aiohttp.http_parser
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from headrace.serving.openai.schemas import ChatRequest, CompletionRequest, EmbeddingRequest
from support.serving import LiveServer, live, scripted_model

OK_CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
OK_TEXT = {"model": "m", "prompt": "hi"}
OK_EMBED = {"model": "e", "input": "hi"}


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    models = scripted_model(max_model_len=64), scripted_model(name="e", kind="embed", max_model_len=32)
    with live(*models, max_body_bytes=200_000) as running:
        yield running


def check_shape(body: Any) -> dict[str, Any]:
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert body["error"]["message"]
    return body["error"]


CHAT_CASES = [
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": 1.5}, "top_k"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": -5}, "max_completion_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"n": 2, "best_of": 1}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"seed": 2**80}, "seed"),
    ({"repetition_penalty": 1e-30}, "repetition_penalty"),
    ({"logit_bias": {"1": 1, "2": True}}, "logit_bias.2"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 33}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop": ["a", 5]}, "stop[1]"),
    ({"stop_token_ids": [9999]}, "stop_token_ids"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"9999": 1}}, "logit_bias"),
    ({"logit_bias": {"1": "a"}}, "logit_bias.1"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": 3}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0]"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, None),
    ({"messages": [{"role": "user", "content": "x", "colour": "red"}]}, "messages[0].colour"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
    ({"messages": None}, "messages"),
    ({"model": 5}, "model"),
    ({"model": None}, "model"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"guided_json": 5}, "guided_json"),
    ({"tool_choice": "required", "tools": []}, "tool_choice"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"tools": [{"type": "magic"}]}, None),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"moderation": {"model": "x"}}, "moderation"),
    ({"length_penalty": 2}, "length_penalty"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"chat_template": "x"}, "chat_template"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"tempature": 1}, "tempature"),
    ({"messages": [{"role": "user", "content": "x" * 100}]}, "messages"),
]


@pytest.mark.parametrize(("change", "param"), CHAT_CASES, ids=lambda value: json.dumps(value)[:50])
def test_bad_chat_fields_are_named(server: LiveServer, change: dict[str, Any], param: str | None) -> None:
    before = len(server.core().requests)
    status, body, headers = server.post("/v1/chat/completions", OK_CHAT | change)
    assert status in (400, 403, 422), body
    error = check_shape(body)
    if param is not None:
        assert error["param"] == param, error
    assert headers["x-request-id"]
    assert len(server.core().requests) == before


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": "x" * 100}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"suffix": "x"}, "suffix"),
        ({"prompt": ["a"] * 100, "n": 128}, "n"),
        ({"prompt": ["a"] * 1025, "best_of": 2}, "best_of"),
        ({"echo": True, "logprobs": 1, "stream": True}, "echo"),
        ({"logprobs": 21}, "logprobs"),
        ({"messages": []}, "messages"),
    ],
    ids=lambda value: json.dumps(value)[:50],
)
def test_bad_completion_fields_are_named(server: LiveServer, change: dict[str, Any], param: str) -> None:
    status, body, _ = server.post("/v1/completions", OK_TEXT | change)
    assert status == 400, body
    assert check_shape(body)["param"] == param


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [[]]}, "input[0]"),
        ({"input": "x" * 50}, "input[0]"),
        ({"input": ["a", "x" * 50]}, "input[1]"),
        ({"input": {"a": 1}}, "input"),
        ({"input": [5000]}, "input[0]"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": 5}, "dimensions"),
    ],
    ids=lambda value: json.dumps(value)[:50],
)
def test_bad_embedding_fields_are_named(server: LiveServer, change: dict[str, Any], param: str) -> None:
    status, body, _ = server.post("/v1/embeddings", OK_EMBED | change)
    assert status == 400, body
    assert check_shape(body)["param"] == param


BROKEN = {
    "empty": b"",
    "not json": b"hello",
    "half": b'{"model": "m"',
    "list": b"[]",
    "null": b"null",
    "nan": b'{"model": "m", "prompt": "a", "temperature": NaN}',
    "infinity": b'{"model": "m", "prompt": "a", "temperature": Infinity}',
    "huge number": b'{"model": "m", "prompt": "a", "temperature": 1e999}',
    "invalid utf-8": b'{"model": "m", "prompt": "\xff\xfe"}',
    "lone surrogate": rb'{"model": "m", "prompt": "\ud800"}',
    "deep": b'{"model": "m", "prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "trailing": b'{"model": "m", "prompt": "a"} x',
    "nul": b"\x00" * 10,
    "big int": b'{"model": "m", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"n": 129}, "at most 128"),
        ({"n": 0}, "at least 1"),
        ({"logprobs": 21}, "at most 20"),
        ({"stop": ["a"] * 33}, "at most 32 items"),
        ({"stop": ""}, "1 or more characters"),
        ({"stop": "x" * 1001}, "at most 1000 characters"),
    ],
    ids=lambda value: json.dumps(value)[:30],
)
def test_what_is_out_of_range_says_the_range(
    server: LiveServer, change: dict[str, Any], expected: str
) -> None:
    """And not that another type was expected, where a field takes several."""
    status, body, _ = server.post("/v1/completions", {"model": "m", "prompt": "x", **change})
    assert status == 400
    error = check_shape(body)
    assert error["code"] == "invalid_value", error
    assert error["message"].endswith(f"expected {expected}")


@pytest.mark.parametrize("name", BROKEN)
def test_broken_bodies(server: LiveServer, name: str) -> None:
    status, body, _ = server.post("/v1/completions", BROKEN[name])
    assert status == 400, (status, body)
    check_shape(body)


def test_large_bodies_are_refused_before_they_are_read(server: LiveServer) -> None:
    for data in (b" " * 10_000_000, json.dumps(OK_CHAT).encode() + b" " * 200_000):
        status, body, _ = server.post("/v1/chat/completions", data)
        assert status == 413
        assert "200000" in check_shape(body)["message"]


def test_large_chunked_body_is_refused(server: LiveServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        sock.sendall(b"493E0\r\n" + b" " * 0x493E0 + b"\r\n0\r\n\r\n")
        assert b" 413 " in sock.recv(4096).split(b"\r\n")[0]


@pytest.mark.parametrize("path", ["/v1/completions", "/rerank", "/predict"])
@pytest.mark.parametrize(
    ("coding", "data"),
    [
        ("gzip", b"not gzip"),
        ("gzip", gzip.compress(b"{}", mtime=0)[:-3]),
        ("gzip", gzip.compress(b"{}", mtime=0) + b"tail"),
        ("deflate", b"not deflate"),
        ("br", b"any"),
        ("gzip, gzip", gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0)),
    ],
)
def test_bad_compression_is_refused(server: LiveServer, path: str, coding: str, data: bytes) -> None:
    status, body, _ = server.post(path, data, **{"Content-Encoding": coding})
    assert status == 400
    check_shape(body)


@pytest.mark.parametrize("coding", ["gzip", "GZIP", "deflate", "deflate, bare", "two gzips", "identity"])
def test_compressed_bodies_are_read(server: LiveServer, coding: str) -> None:
    plain = json.dumps(OK_CHAT).encode()
    bare = zlib.compressobj(wbits=-15)
    data = {
        "deflate": zlib.compress(plain),
        "deflate, bare": bare.compress(plain) + bare.flush(),
        "two gzips": gzip.compress(plain[:20]) + gzip.compress(plain[20:]),
        "identity": plain,
    }.get(coding, gzip.compress(plain))
    name = {"two gzips": "gzip", "deflate, bare": "deflate"}.get(coding, coding)
    status, body, _ = server.post("/v1/chat/completions", data, **{"Content-Encoding": name})
    assert status == 200, body


@pytest.mark.parametrize("path", ["/v1/completions", "/rerank"])
def test_no_more_of_a_compressed_body_is_unpacked_than_may_be_read(
    server: LiveServer, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One byte can become a thousand, and the loop that unpacks them serves everybody: so aiohttp's own
    unpacking, which has no end, must not run."""
    unpacked: list[int] = []
    monkeypatch.setattr(
        aiohttp.http_parser.DeflateBuffer, "feed_data", lambda _, data, *more: unpacked.append(len(data))
    )
    bomb = gzip.compress(bytes(64_000_000))  # 62 KB, below the limit
    status, body, _ = server.post(path, bomb, **{"Content-Encoding": "gzip"})
    assert status == 413
    assert "200000" in check_shape(body)["message"]
    assert not unpacked


def test_unknown_route_and_method(server: LiveServer) -> None:
    status, body, _ = server.post("/v1/chat/completion", OK_CHAT)
    assert status == 404
    assert "/v1/chat/completions" in check_shape(body)["message"]
    status, body, headers = server.request("GET", "/v1/chat/completions")
    assert status == 405
    assert headers["allow"] == "POST"
    check_shape(body)
    status, body, _ = server.request("GET", "/v1/models/none")
    assert status == 404
    assert check_shape(body)["code"] == "model_not_found"


def test_head_is_get_without_a_body(server: LiveServer) -> None:
    """HTTP asks it of servers (RFC 9110, 9.1), and load balancers probe with it."""
    for path in ("/health", "/ready", "/metrics", "/v1/models", "/v1/models/m", "/openapi.json"):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.request("HEAD", path)
        reply = connection.getresponse()
        assert (reply.status, reply.read()) == (200, b"")
        assert int(reply.headers["Content-Length"]) > 0
        connection.close()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("HEAD", "/v1/completions")
    assert connection.getresponse().status == 405


def test_unknown_field_names_the_nearest(server: LiveServer) -> None:
    _, body, _ = server.post("/v1/chat/completions", OK_CHAT | {"max_token": 5})
    assert "max_tokens" in body["error"]["message"]
    assert body["error"]["code"] == "unknown_field"


def test_bad_timeout_header(server: LiveServer) -> None:
    for value in ("soon", "-1", "0", "9" * 30):
        status, body, _ = server.post("/v1/completions", OK_TEXT, **{"Request-Timeout-Ms": value})
        assert status == 400
        assert check_shape(body)["param"] == "Request-Timeout-Ms"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = {
    "/v1/chat/completions": "headrace.serving.openai.schemas:ChatRequest",
    "/v1/completions": "headrace.serving.openai.schemas:CompletionRequest",
    "/v1/embeddings": "headrace.serving.openai.schemas:EmbeddingRequest",
}


def fields_of(path: str) -> list[str]:
    import importlib

    module, name = FIELDS[path].split(":")
    return sorted(getattr(importlib.import_module(module), name).model_fields)


@pytest.mark.parametrize(("path", "base"), list(zip(FIELDS, (OK_CHAT, OK_TEXT, OK_EMBED))))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fuzzed_bodies_never_fail_the_server(
    server: LiveServer, path: str, base: dict[str, Any], data: st.DataObject
) -> None:
    names = st.sampled_from(fields_of(path)) | st.text(max_size=5)
    body = base | data.draw(st.dictionaries(names, json_values, min_size=1, max_size=3))
    text = json.dumps(body).encode("utf-8", "surrogatepass")
    status, reply, _ = server.post(path, text)
    if status == 500:  # the scripted engine follows no grammar, and says so rather than pass it on
        assert reply["error"]["code"] == "constraint_violated", (body, reply)
    elif status != 200:
        assert status in (400, 403, 404, 422), (body, reply)
        check_shape(reply)


@pytest.mark.parametrize(
    ("schema", "change"),
    [
        (CompletionRequest, {"prompt": [*["a"] * 5000, 5]}),
        (CompletionRequest, {"prompt": [*[5] * 5000, "a"]}),
        (CompletionRequest, {"prompt": [["a"]] * 5000}),
        (CompletionRequest, {"prompt": "a"} | {f"f{k}": 1 for k in range(5000)}),
        (CompletionRequest, {"prompt": "a", "logit_bias": {str(k): "x" for k in range(5000)}}),
        (CompletionRequest, {"prompt": "a", "stop_token_ids": ["x"] * 5000}),
        (ChatRequest, {"messages": [{"role": "king", "content": 5}] * 5000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [5] * 5000}]}),
        (ChatRequest, {"messages": [{"role": "user", "content": "a"} | {f"f{k}": 1 for k in range(5000)}]}),
        (EmbeddingRequest, {"input": [*[1] * 5000, "a"]}),
    ],
    ids=range(10),
)
def test_one_finding_is_enough(schema: type[BaseModel], change: dict[str, Any]) -> None:
    """Bodies are checked on the event loop: a finding for each wrong item would hold up every request."""
    with pytest.raises(ValidationError) as found:
        schema.model_validate({"model": "m"} | change)
    assert found.value.error_count() < 10


def test_bad_requests_disturb_nobody() -> None:
    with live() as server:
        for data in BROKEN.values():
            server.post("/v1/completions", data)
        assert server.post("/v1/chat/completions", OK_CHAT)[0] == 200
        assert len(server.core().requests) == 1


@pytest.mark.parametrize(
    "raw",
    [
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",  # TLS spoken to a plain port
        b"GET /health HTTP/9.9\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: x\r\nbad header\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: x\r\nlong: " + b"a" * 20_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n",
    ],
    ids=lambda raw: repr(raw[:24]),
)
def test_what_is_no_http_gets_the_same_json(server: LiveServer, raw: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.sendall(raw)
        reply = http.client.HTTPResponse(sock)
        reply.begin()
        assert reply.status == 400
        assert reply.headers["content-type"].startswith("application/json")
        assert reply.headers["x-request-id"]
        error = check_shape(json.loads(reply.read()))
        assert error["type"] == "invalid_request_error"
        assert error["code"] == "malformed_http"
        assert sock.recv(1) == b""  # closed: what follows could not be read either
    assert server.request("GET", "/health", None, {})[0] == 200
