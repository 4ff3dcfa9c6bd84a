"""Agents' libraries against the packaged model: what they send is taken, and what they get they can read.

The model is far too small to be sensible, so the tests look at forms: typed results, and tools called with arguments of
their types. Libraries that are not installed are skipped.
"""

from __future__ import annotations

from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from support.serving import LiveServer

pytestmark = pytest.mark.models

CITIES = Literal["Paris", "Rome"]


class City(BaseModel):
    """A city."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=12)
    kind: Literal["town", "city"]
    people: int = Field(ge=0, le=99_999_999)


def test_responses_parse(server: LiveServer) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
    reply = client.responses.parse(
        model="m", input="Paris", text_format=City, max_output_tokens=150, temperature=0
    )
    assert isinstance(reply.output_parsed, City)


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_instructor(server: LiveServer, mode: str) -> None:
    instructor = pytest.importorskip("instructor")
    client = instructor.from_openai(
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120),
        mode=getattr(instructor.Mode, mode),
    )
    found = client.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "Paris"}],
        response_model=City,
        max_tokens=150,
        max_retries=0,
        seed=1,
    )
    assert isinstance(found, City)


def test_pydantic_ai_with_two_tools(server: LiveServer) -> None:
    ai = pytest.importorskip("pydantic_ai")
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{server.url}/v1", api_key="none")
    settings: Any = {"max_tokens": 150, "seed": 3}
    agent = ai.Agent(
        OpenAIChatModel("m", provider=provider), output_type=City, model_settings=settings, retries=3
    )
    asked: list[str] = []

    @agent.tool_plain
    def weather(city: CITIES) -> str:
        """Weather of a city."""
        asked.append(city)
        return "sunny"

    @agent.tool_plain
    def population(city: CITIES) -> int:
        """People of a city."""
        asked.append(city)
        return 2_000_000

    try:
        result = agent.run_sync("Tell me of Paris", usage_limits=ai.UsageLimits(request_limit=6))
    except ai.exceptions.UsageLimitExceeded:  # it went on calling tools: each call was right
        assert asked
    else:
        assert isinstance(result.output, City)
    assert set(asked) <= {"Paris", "Rome"}


def test_anthropic_tools_streamed_and_their_results(server: LiveServer) -> None:
    anthropic = pytest.importorskip("anthropic")
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=120)
    tool = {"name": "city", "description": "Tells of a city.", "input_schema": City.model_json_schema()}
    messages: list[Any] = [{"role": "user", "content": "Paris"}]
    greedy: Any = {"extra_body": {"temperature": 0}}
    given: dict[str, Any] = {"model": "m", "max_tokens": 150, "tools": [tool], **greedy}
    with client.messages.stream(
        **given, messages=messages, tool_choice={"type": "tool", "name": "city"}
    ) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_message()
    assert {"message_start", "content_block_start", "content_block_stop", "message_stop"} <= kinds
    assert message.stop_reason == "tool_use"
    (call,) = [block for block in message.content if block.type == "tool_use"]
    City.model_validate(call.input)
    messages += [
        {"role": "assistant", "content": [block.model_dump() for block in message.content]},
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "2 million"}],
        },
    ]
    last = client.messages.create(
        model="m", max_tokens=12, **greedy, messages=messages, tools=[tool], tool_choice={"type": "none"}
    )
    assert last.content[0].type == "text"
