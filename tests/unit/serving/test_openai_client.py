"""The openai client against a real server: replies, streams, choices, logprobs, usage."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Iterator

import openai
import pytest

from headrace.engines.scripted import Step
from headrace.types import Request
from support.serving import EOS, LiveServer, events, live, says, scripted_model

TEXT = "Héllo 🎉 wörld — 你好!"


def by_seed(request: Request) -> Iterator[Step]:
    """Says which choice it is, by its seed."""
    assert request.sampling is not None
    yield Step(tuple(f"seed {request.sampling.seed}".encode()))
    yield Step((EOS,), stop=True)


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live(
        scripted_model(says(TEXT), names=("alias",)),
        scripted_model(by_seed, name="seeds"),
        scripted_model(kind="embed", name="e"),
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


ASK = [{"role": "user", "content": "hi"}]


def test_chat_reply_and_usage(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="m", messages=ASK)
    assert reply.choices[0].message.content == TEXT
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.prompt_tokens == len(b"user: hi\nassistant: ")
    assert reply.usage.completion_tokens == len(TEXT.encode()) + 1
    assert reply.model == "m"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_streamed_deltas_joined_equal_the_whole_reply(size: int) -> None:
    with live(scripted_model(says(TEXT, size=size))) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        chunks = list(client.chat.completions.create(model="m", messages=ASK, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_usage_comes_last_with_no_choices(client: openai.OpenAI) -> None:
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(model="m", messages=ASK, stream=True, stream_options=options)
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(TEXT.encode()) + 1
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_continuous_usage_grows(client: openai.OpenAI) -> None:
    options = {"continuous_usage_stats": True}
    chunks = list(
        client.chat.completions.create(model="m", messages=ASK, stream=True, stream_options=options)
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == len(TEXT.encode()) + 1


def test_async_client_streams_many_at_once(server: LiveServer) -> None:
    async def one(client: openai.AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(model="alias", messages=ASK, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(one(client) for _ in range(20)))

    assert set(asyncio.run(main())) == {TEXT}


def test_choices_derive_seeds_that_are_reproducible(client: openai.OpenAI) -> None:
    def ask(n: int) -> list[str]:
        reply = client.chat.completions.create(model="seeds", messages=ASK, n=n, seed=7)
        assert [choice.index for choice in reply.choices] == list(range(n))
        return [choice.message.content for choice in reply.choices]

    four = ask(4)
    assert four[0] == "seed 7"
    assert len(set(four)) == 4
    assert ask(4) == four
    assert ask(1) == four[:1]


def test_streamed_choices_keep_their_indices(client: openai.OpenAI) -> None:
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(model="m", messages=ASK, n=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [TEXT] * 3


def test_stop_string_over_token_borders_ends_and_aborts(server: LiveServer, client: openai.OpenAI) -> None:
    before = len(server.core().aborted)
    reply = client.chat.completions.create(model="m", messages=ASK, stop=["🎉 wö", "nowhere"])
    assert reply.choices[0].message.content == "Héllo "
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].stop_reason == "🎉 wö"
    assert reply.usage.completion_tokens == len("Héllo 🎉 wö".encode())
    assert len(server.core().aborted) == before + 1


def test_stop_string_kept_when_asked_for(client: openai.OpenAI) -> None:
    extra = {"include_stop_str_in_output": True}
    chunks = client.chat.completions.create(model="m", messages=ASK, stop="🎉", stream=True, extra_body=extra)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Héllo 🎉"


def test_a_started_stop_string_that_does_not_complete_is_given_out(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="m", messages=ASK, stop="!!")
    assert reply.choices[0].message.content == TEXT


def test_max_tokens_ends_with_length(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="m", messages=ASK, max_completion_tokens=3)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 3
    assert reply.choices[0].message.content == "Hé"


def test_cut_character_at_the_end_is_replaced_in_both_ways(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="m", messages=ASK, max_tokens=2)
    parts = client.chat.completions.create(model="m", messages=ASK, max_tokens=2, stream=True)
    assert whole.choices[0].message.content == "H\ufffd"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in parts) == "H\ufffd"


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs_have_text_and_bytes(client: openai.OpenAI, stream: bool) -> None:
    ask = {"model": "m", "messages": ASK, "logprobs": True, "top_logprobs": 2, "max_tokens": 4}
    if stream:
        chunks = client.chat.completions.create(**ask, stream=True)
        entries = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    else:
        entries = client.chat.completions.create(**ask).choices[0].logprobs.content
    assert [entry.token for entry in entries] == ["H", "bytes:\\xc3", "bytes:\\xa9", "l"]
    assert [entry.bytes for entry in entries] == [[0x48], [0xC3], [0xA9], [0x6C]]
    assert [len(entry.top_logprobs) for entry in entries] == [2] * 4
    assert entries[0].logprob == -0.25


def test_completion_of_several_prompts(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="seeds", prompt=["one", "two"], n=2, seed=1, max_tokens=100)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in reply.choices]
    assert texts[0] == texts[2] == "seed 1"
    assert texts[1] == texts[3] != texts[0]
    assert reply.usage.prompt_tokens == 8


def test_completion_takes_token_ids_and_defaults_to_16_tokens(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="m", prompt=[72, 105])
    assert reply.usage.prompt_tokens == 2
    assert reply.usage.completion_tokens == 16
    assert reply.choices[0].finish_reason == "length"


def test_completion_echo_and_logprobs(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="m", prompt="ab", echo=True, logprobs=1, max_tokens=2)
    choice = reply.choices[0]
    assert choice.text == "abH\ufffd"
    assert choice.logprobs.tokens == ["<bos>", "a", "b", "H", "bytes:\\xc3"]
    assert choice.logprobs.token_logprobs == [None, -0.25, -0.25, -0.25, -0.25]
    assert choice.logprobs.top_logprobs[0] is None


def test_completion_scoring_without_output(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="m", prompt="ab", echo=True, logprobs=0, max_tokens=0)
    assert reply.choices[0].text == "ab"
    assert len(reply.choices[0].logprobs.tokens) == 3


def test_completion_stream_with_echo(client: openai.OpenAI) -> None:
    chunks = client.completions.create(model="m", prompt="ab", echo=True, max_tokens=1, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "abH"


def test_best_of_returns_the_most_likely(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="seeds", prompt="x", n=1, best_of=3, seed=5, max_tokens=100)
    assert len(reply.choices) == 1
    assert reply.choices[0].logprobs is None
    assert reply.usage.completion_tokens > 3 * 5


def test_prompt_logprobs_and_token_ids(server: LiveServer) -> None:
    body = {"model": "m", "prompt": "ab", "max_tokens": 1, "prompt_logprobs": 0, "return_token_ids": True}
    _, reply, _ = server.post("/v1/completions", body)
    choice = reply["choices"][0]
    assert choice["token_ids"] == [72]
    assert choice["prompt_token_ids"] == [256, 97, 98]
    assert choice["prompt_logprobs"][0] is None
    assert choice["prompt_logprobs"][1]["97"]["decoded_token"] == "a"


def test_embeddings_as_numbers_and_as_base64(server: LiveServer, client: openai.OpenAI) -> None:
    parts = client.embeddings.create(model="e", input=["a", "bc"], encoding_format="float")
    assert [item.index for item in parts.data] == [0, 1]
    assert parts.usage.prompt_tokens == 5
    _, raw, _ = server.post("/v1/embeddings", {"model": "e", "input": "a", "encoding_format": "base64"})
    numbers = struct.unpack("<8f", base64.b64decode(raw["data"][0]["embedding"]))
    assert list(numbers) == parts.data[0].embedding
    assert len(client.embeddings.create(model="e", input=[1, 2, 3]).data) == 1  # its default is base64


def test_models_side_by_side(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["m", "alias", "seeds", "e"]
    assert client.models.retrieve("alias").root == "m"
    with pytest.raises(openai.NotFoundError, match="served here: m, alias, seeds, e"):
        client.chat.completions.create(model="nope", messages=ASK)
    with pytest.raises(openai.UnprocessableEntityError, match="embeddings"):
        client.chat.completions.create(model="e", messages=ASK)
    with pytest.raises(openai.UnprocessableEntityError, match="generates text"):
        client.embeddings.create(model="m", input="x")


def test_template_gets_tools_documents_and_variables(server: LiveServer) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    body = {
        "model": "m",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "done"},
        ],
        "tools": [tool],
        "documents": [{"text": "d"}],
        "chat_template_kwargs": {"enable_thinking": True},
        "reasoning_effort": "none",
    }
    status, reply, _ = server.post("/v1/chat/completions", body)
    assert status == 200, reply
    seen = server.state.models.find("m").engine.kit.rendered[-1]
    assert seen["tools"] == [tool]
    assert seen["documents"] == [{"text": "d"}]
    assert seen["kwargs"]["enable_thinking"] is True
    assert seen["kwargs"]["reasoning_effort"] == "none"
    assert seen["messages"][0]["content"] == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert seen["messages"][1]["tool_calls"] == [call]
    server.post("/v1/chat/completions", body | {"tool_choice": "none"})
    assert server.state.models.find("m").engine.kit.rendered[-1]["tools"] is None


def test_stream_ends_with_done(server: LiveServer) -> None:
    _, text, headers = server.post("/v1/chat/completions", {"model": "m", "messages": ASK, "stream": True})
    assert headers["content-type"].startswith("text/event-stream")
    assert events(text)[-1] == "[DONE]"


def test_checkpoint_advice_applies_where_the_request_is_silent() -> None:
    with live(scripted_model(sampling_defaults={"temperature": 0.6, "top_k": 20})) as server:
        server.post("/v1/chat/completions", {"model": "m", "messages": ASK, "top_k": 5})
        params = server.core().requests[0].sampling
    assert (params.temperature, params.top_k) == (0.6, 5)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 9000}),
        ("/v1/completions", {"prompt": "hi", "max_tokens": 9000}),
        ("/v1/responses", {"input": "hi", "max_output_tokens": 9000}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9000}),
    ],
)  # fmt: skip
def test_a_limit_beyond_the_context_is_cut_and_told(path: str, body: dict[str, object]) -> None:
    with live(scripted_model(max_model_len=64)) as server:
        status, reply, headers = server.post(path, {"model": "m", **body})
        assert status == 200
        (told,) = reply["warnings"]
        assert "9000 output tokens was cut to" in told
        assert "context of 64" in told
        assert headers["x-headrace-warnings"] == told
        room = int(told.split("cut to ")[1].split(":")[0])
        (request,) = server.core().requests
        assert request.sampling.max_tokens == room == 64 - len(request.token_ids)
        limit = next(name for name in body if "tokens" in name)
        status, reply, headers = server.post(path, {"model": "m", **body, limit: room})
        assert status == 200
        assert "warnings" not in reply
        assert "x-headrace-warnings" not in headers


def test_a_default_limit_beyond_the_context_is_not_told() -> None:
    with live(scripted_model(max_model_len=12)) as server:
        status, reply, headers = server.post("/v1/completions", {"model": "m", "prompt": "hi"})
        assert status == 200
        assert "x-headrace-warnings" not in headers
        assert "warnings" not in reply
