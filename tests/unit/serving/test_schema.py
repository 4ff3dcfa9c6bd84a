"""Request schemas against OpenAI's own: every field that a stock client can send is known here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletionAssistantMessageParam, ChatCompletionMessage
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as TextParams
from openai.types.embedding_create_params import EmbeddingCreateParams
from openai.types.responses.response_create_params import ResponseCreateParamsBase

from headrace.serving.anthropic.schemas import MessagesRequest
from headrace.serving.openai.responses_schema import ResponsesRequest
from headrace.serving.openai.schemas import ChatRequest, CompletionRequest, EmbeddingRequest, Message
from support.serving import live, scripted_model

SCHEMAS = [ChatRequest, CompletionRequest, ResponsesRequest, MessagesRequest, EmbeddingRequest]
HARMLESS: dict[str, Any] = {
    "audio": {"voice": "alloy", "format": "wav"},
    "frequency_penalty": 0.5,
    "function_call": "auto",
    "functions": [{"name": "f", "parameters": {"type": "object"}}],
    "logit_bias": {"65": -1},
    "logprobs": True,
    "max_completion_tokens": 5,
    "max_tokens": 5,
    "metadata": {"a": "b"},
    "modalities": ["text"],
    "moderation": None,
    "n": 1,
    "parallel_tool_calls": True,
    "prediction": {"type": "content", "content": "x"},
    "presence_penalty": 0.5,
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "low",
    "response_format": {"type": "text"},
    "safety_identifier": "s",
    "seed": 1,
    "service_tier": "auto",
    "stop": ["\n\n"],
    "store": True,
    "stream": False,
    "stream_options": None,
    "temperature": 1,
    "tool_choice": "none",
    "tools": [{"type": "function", "function": {"name": "f", "strict": True}}],
    "top_logprobs": None,
    "top_p": 0.9,
    "user": "u",
    "verbosity": "low",
    "web_search_options": None,
}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (ChatRequest, ChatParams),
        (CompletionRequest, TextParams),
        (EmbeddingRequest, EmbeddingCreateParams),
        (ResponsesRequest, ResponseCreateParamsBase),
    ],
)
def test_every_field_of_openais_schema_is_known(ours: Any, theirs: Any) -> None:
    assert set(theirs.__annotations__) - set(ours.model_fields) == set()


def test_messages_that_the_client_hands_back_are_known() -> None:
    theirs = set(ChatCompletionAssistantMessageParam.__annotations__) | set(
        ChatCompletionMessage.model_fields
    )
    assert theirs - set(Message.model_fields) == set()


def test_every_openai_field_gets_a_reply() -> None:
    assert set(ChatParams.__annotations__) - {"messages", "model"} == set(HARMLESS) - {"stream"}
    with live(scripted_model()) as server:
        base = {"model": "m", "messages": [{"role": "developer", "content": "hi"}]}
        for name, value in HARMLESS.items():
            more = {"functions": HARMLESS["functions"]} if name == "function_call" else {}
            status, body, _ = server.post("/v1/chat/completions", base | more | {name: value})
            assert status == 200, (name, body)
        kept = {k: v for k, v in HARMLESS.items() if k not in ("functions", "function_call")}
        status, body, _ = server.post("/v1/chat/completions", base | kept)
        assert status == 200, body
        assert body["service_tier"] == "default"
        nulls = dict.fromkeys(HARMLESS)
        status, body, _ = server.post("/v1/chat/completions", base | nulls)
        assert status == 200, body


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_field_says_what_it_does(schema: Any) -> None:
    for name, field in schema.model_fields.items():
        assert field.description, name
        assert field.json_schema_extra["effect"] in ("acted on", "accepted, no effect", "refused"), name


def test_docs_name_every_metric() -> None:
    with live() as server:
        server.post("/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": "x"}]})
        _, text, _ = server.request("GET", "/metrics")
    page = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text(encoding="utf-8")
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert len(names) > 20
    missing = {name for name in names if f"`{name}`" not in page}
    assert not missing


CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {**CHAT, "web_search_options": {}}, "web_search_options"),
        ("/v1/responses", {"model": "m", "input": "x", "include": ["message.output_text.logprobs"]}, "include"),
        ("/v1/messages", {**CHAT, "max_tokens": 4, "inference_geo": "us"}, "inference_geo"),
    ],
)  # fmt: skip
def test_what_would_change_the_reply_is_refused_by_name(path: str, body: dict[str, Any], param: str) -> None:
    with live(scripted_model()) as server:
        status, reply, _ = server.post(path, body)
        assert status == 400
        assert param in reply["error"]["message"]
        kept = {name: value for name, value in body.items() if name != param}
        allowed = {"include": ["reasoning.encrypted_content"], "inference_geo": "global"}.get(param)
        assert server.post(path, kept | {param: allowed})[0] == 200


def test_verbosity_goes_to_the_template_or_is_told() -> None:
    reads = "{{ verbosity }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with live(scripted_model(template=reads)) as server:
        status, reply, _ = server.post("/v1/chat/completions", CHAT | {"verbosity": "low"})
        assert status == 200
        assert "warnings" not in reply
        assert server.state.models.find("m").engine.kit.rendered[-1]["kwargs"]["verbosity"] == "low"
    with live(scripted_model()) as server:
        _, reply, _ = server.post("/v1/chat/completions", CHAT | {"verbosity": "low"})
        assert "verbosity has no effect" in reply["warnings"][0]
        text = {"verbosity": "low"}
        _, reply, _ = server.post("/v1/responses", {"model": "m", "input": "x", "text": text})
        assert "verbosity has no effect" in reply["warnings"][0]
