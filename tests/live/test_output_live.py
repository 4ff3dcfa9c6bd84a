"""Structured output and tools from the packaged model through the real server and engine process."""

from __future__ import annotations

import json
import re
import threading
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from support.serving import LiveServer

pytestmark = pytest.mark.models


@pytest.fixture(scope="module")
def client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


class City(BaseModel):
    name: str = Field(max_length=12)
    kind: Literal["town", "city"]
    people: int = Field(ge=0, le=99_999_999)


USER: Any = [{"role": "user", "content": "Tell me of Paris as JSON."}]
TOOL: Any = openai.pydantic_function_tool(City)


def test_parse(client: openai.OpenAI) -> None:
    for seed in range(3):
        reply = client.chat.completions.parse(
            model="m", messages=USER, response_format=City, seed=seed, max_tokens=90, temperature=1.3
        )
        assert reply.choices[0].finish_reason == "stop"
        assert isinstance(reply.choices[0].message.parsed, City)


def test_forced_calls_and_the_turn_after(client: openai.OpenAI) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "City"}}):
        reply = client.chat.completions.parse(
            model="m",
            messages=USER,
            tools=[TOOL],
            tool_choice=choice,
            parallel_tool_calls=False,
            max_tokens=120,
            seed=1,
        )
        message = reply.choices[0].message
        assert reply.choices[0].finish_reason == "tool_calls"
        assert isinstance(message.tool_calls[0].function.parsed_arguments, City)
    after = [*USER, message.model_dump(exclude_none=True, exclude={"parsed"})]
    for call in after[-1]["tool_calls"]:
        call["function"].pop("parsed_arguments", None)
    after.append(
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Paris has 2 million."}
    )
    last = client.chat.completions.create(
        model="m", messages=after, tools=[TOOL], tool_choice="none", max_tokens=12, seed=1
    )
    assert last.choices[0].message.content


def test_streamed_call(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="m",
        messages=USER,
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=120,
        seed=1,
    ) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.tool_calls[0].function.parsed_arguments, City)


def test_many_kinds_at_once(client: openai.OpenAI) -> None:
    """Different grammars, free text and a refused one in one batch."""
    forms: list[tuple[dict[str, Any], str | None]] = [
        ({"guided_regex": "[A-Z][a-z]{2,5}"}, "[A-Z][a-z]{2,5}"),
        ({"guided_choice": ["red", "green"]}, "red|green"),
        ({"guided_grammar": 'start: "<" /[0-9]{1,4}/ ">"'}, "<[0-9]{1,4}>"),
        ({}, None),
        ({"response_format": {"type": "json_object"}}, None),
        ({"guided_regex": "("}, "refused"),
    ]
    found: dict[int, Any] = {}

    def one(i: int) -> None:
        extra, _expected = forms[i % len(forms)]
        try:
            reply = client.chat.completions.create(
                model="m", messages=USER, max_tokens=40, n=2, seed=i, extra_body=extra, logprobs=True
            )
            found[i] = [(c.finish_reason, c.message.content) for c in reply.choices]
        except openai.BadRequestError as error:
            found[i] = error

    threads = [threading.Thread(target=one, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(found) == 12
    for i, answers in found.items():
        extra, expected = forms[i % len(forms)]
        if expected == "refused":
            assert isinstance(answers, openai.BadRequestError)
            continue
        for reason, text in answers:
            if expected is not None:
                assert reason == "stop"
                assert re.fullmatch(expected, text), text
            elif "response_format" in extra and reason == "stop":
                assert isinstance(json.loads(text), dict)
