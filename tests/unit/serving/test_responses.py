"""/v1/responses and /v1/messages, with the clients that speak them."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from headrace.errors import NotFound
from headrace.serving.openai.response_store import ResponseStore, Stored
from support.serving import LiveServer, live, says, scripted_model
from support.turns import HERMES, HERMES_NOW, TOOLS

SAID = f"<think>hm</think>\nLooking.\n{HERMES}\n{HERMES_NOW}"
TEMPLATE = "{{ tools }} <tool_call> <think> </think>"
FUNCTIONS: Any = [{"type": "function", "name": name, "parameters": schema} for name, schema in TOOLS.items()]


class Answer(BaseModel):
    value: int


def serve(text: str, **more: Any) -> Any:
    return live(scripted_model(says(text, size=5), template=TEMPLATE, **more))


def client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def summary(output: Any) -> list[tuple[str, str]]:
    found = []
    for item in output:
        if item.type == "function_call":
            found.append((item.name, json.loads(item.arguments)))
        else:
            found.append((item.type, item.content[0].text))
    return found


EXPECTED = [
    ("reasoning", "hm"),
    ("message", "Looking."),
    ("get_weather", {"city": 'Köln "am" Rhein 🌧', "days": 3}),
    ("now", {}),
]


def test_items_whole_and_streamed() -> None:
    with serve(SAID) as server:
        api = client(server).responses
        whole = api.create(model="m", input="hi", tools=FUNCTIONS, instructions="Be brief.")
        assert summary(whole.output) == EXPECTED
        assert whole.status == "completed"
        assert whole.usage is not None
        assert whole.usage.output_tokens_details.reasoning_tokens == 2
        seen = server.state.models.find("m").engine.kit.rendered[-1]  # type: ignore[attr-defined]
        assert seen["messages"][0] == {"role": "system", "content": "Be brief."}
        events = list(api.create(model="m", input="hi", tools=FUNCTIONS, stream=True))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert [events[0].type, events[1].type] == ["response.created", "response.in_progress"]
        assert events[-1].type == "response.completed"
        assert summary(events[-1].response.output) == EXPECTED
        items = [event.item for event in events if event.type == "response.output_item.done"]
        assert summary(items) == EXPECTED
        pieces: dict[int, str] = {}
        for event in events:
            if event.type.endswith(".delta"):
                pieces[event.output_index] = pieces.get(event.output_index, "") + event.delta
        assert pieces[0] == "hm"
        assert pieces[1] == "Looking."
        assert json.loads(pieces[2]) == EXPECTED[2][1]
        with client(server).responses.stream(model="m", input="hi", tools=FUNCTIONS) as stream:
            final = stream.get_final_response()
        assert summary(final.output) == EXPECTED


def test_stored_responses_go_on() -> None:
    with serve(SAID) as server:
        api = client(server).responses
        first = api.create(model="m", input="hi", tools=FUNCTIONS)
        assert api.retrieve(first.id).output_text == "Looking."
        calls = [item for item in first.output if item.type == "function_call"]
        results: Any = [
            {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"} for call in calls
        ]
        api.create(model="m", input=results, previous_response_id=first.id, tools=FUNCTIONS)
        seen = server.state.models.find("m").engine.kit.rendered[-1]["messages"]  # type: ignore[attr-defined]
        assert [message["role"] for message in seen] == ["user", "assistant", "tool", "tool"]
        assert seen[1]["reasoning_content"] == "hm"
        assert [call["id"] for call in seen[1]["tool_calls"]] == [call.call_id for call in calls]
        stateless: Any = [
            {"role": "user", "content": "hi"},
            *(item.model_dump() for item in first.output),
            *results,
        ]
        api.create(model="m", input=stateless, tools=FUNCTIONS, store=False)
        again = server.state.models.find("m").engine.kit.rendered[-1]["messages"]  # type: ignore[attr-defined]
        assert again == seen
        api.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            api.retrieve(first.id)
        with pytest.raises(openai.NotFoundError):
            api.create(model="m", input="x", previous_response_id=first.id)


def test_structured_text_and_length() -> None:
    with serve('{"value": 7}') as server:
        api = client(server).responses
        assert api.parse(model="m", input="x", text_format=Answer).output_parsed == Answer(value=7)
        cut = api.create(model="m", input="x", max_output_tokens=4)
        assert cut.status == "incomplete"
        assert cut.incomplete_details is not None
        assert cut.incomplete_details.reason == "max_output_tokens"
    with serve("no JSON") as server:
        with pytest.raises(openai.InternalServerError):
            client(server).responses.parse(model="m", input="x", text_format=Answer)
        schema = {"type": "json_schema", "name": "a", "schema": Answer.model_json_schema()}
        body = {"model": "m", "input": "x", "text": {"format": schema}, "stream": True}
        _, text, _ = server.post("/v1/responses", body)
        last = text.strip().split("\n\n")[-1]
        assert last.startswith("event: error\n")
        assert "does not follow" in last
        assert "response.completed" not in text


@pytest.mark.parametrize(
    "change",
    [
        {"tools": [{"type": "web_search"}]},
        {"background": True},
        {"truncation": "auto"},
        {"input": [{"type": "image"}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        {"input": [{"role": "king", "content": "x"}]},
        {"input": [{"type": "function_call", "call_id": "1"}]},
        {"input": []},
        {"tool_choice": "required"},
    ],
)
def test_what_is_not_offered_is_refused(change: dict[str, Any]) -> None:
    with serve("x") as server:
        status, reply, _ = server.post("/v1/responses", {"model": "m", "input": "x"} | change)
        assert status == 400, reply
        assert reply["error"]["message"]
        assert not server.core().requests


def test_the_store_is_bounded() -> None:
    store = ResponseStore(limit=3, limit_bytes=1000)
    for i in range(5):
        store.put(str(i), Stored(b"x" * 100, []))
    with pytest.raises(NotFound):
        store.get("1", "id")
    assert store.get("2", "id").reply
    store.put("big", Stored(b"x" * 950, []))
    with pytest.raises(NotFound):
        store.get("4", "id")
    store.delete("big")
    assert store._bytes == 0


# --- Anthropic's shape ---------------------------------------------------------------------------

CUSTOM: Any = [{"name": name, "input_schema": schema} for name, schema in TOOLS.items()]
ASK: Any = {"model": "m", "max_tokens": 1000, "messages": [{"role": "user", "content": "hi"}]}


def blocks(content: Any) -> list[tuple[str, Any]]:
    found = []
    for block in content:
        if block.type == "tool_use":
            found.append((block.name, block.input))
        else:
            found.append((block.type, block.thinking if block.type == "thinking" else block.text))
    return found


BLOCKS = [("thinking", "hm"), ("text", "Looking."), *EXPECTED[2:]]


def test_messages_whole_and_streamed() -> None:
    anthropic = pytest.importorskip("anthropic")
    with serve(SAID) as server:
        api = anthropic.Anthropic(base_url=server.url, api_key="k", max_retries=0).messages
        whole = api.create(**ASK, tools=CUSTOM, system="Be brief.")
        assert blocks(whole.content) == BLOCKS
        assert whole.stop_reason == "tool_use"
        assert whole.usage.output_tokens == len(SAID.encode()) + 1
        with api.stream(**ASK, tools=CUSTOM) as stream:
            final = stream.get_final_message()
        assert blocks(final.content) == BLOCKS
        assert final.stop_reason == "tool_use"
        uses = [block for block in whole.content if block.type == "tool_use"]
        results = [{"type": "tool_result", "tool_use_id": use.id, "content": "sunny"} for use in uses]
        history = [
            *ASK["messages"],
            {
                "role": "assistant",
                "content": [block.model_dump(exclude_none=True) for block in whole.content],
            },
            {"role": "user", "content": [*results, {"type": "text", "text": "and?"}]},
        ]
        api.create(**(ASK | {"messages": history}), tools=CUSTOM)
        seen = server.state.models.find("m").engine.kit.rendered[-1]["messages"]
        assert [message["role"] for message in seen] == ["user", "assistant", "tool", "tool", "user"]
        assert seen[1]["reasoning_content"] == "hm"


def test_messages_errors_stops_and_keys() -> None:
    anthropic = pytest.importorskip("anthropic")
    with serve("one two three", tool_call_parser="hermes") as server:
        api = anthropic.Anthropic(base_url=server.url, api_key="k", max_retries=0).messages
        stopped = api.create(**ASK, stop_sequences=["three"])
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "three")
        assert api.create(**(ASK | {"max_tokens": 3})).stop_reason == "max_tokens"
        assert api.create(**ASK).stop_reason == "end_turn"
        with pytest.raises(anthropic.BadRequestError, match="text"):
            api.create(**(ASK | {"messages": [{"role": "user", "content": [{"type": "image"}]}]}))
        with pytest.raises(anthropic.InternalServerError, match="no tool"):
            api.create(**ASK, tools=CUSTOM, tool_choice={"type": "any"})
        with (
            pytest.raises(anthropic.APIStatusError),
            api.stream(**ASK, tools=CUSTOM, tool_choice={"type": "any"}) as stream,
        ):
            stream.get_final_message()
    with live(scripted_model(says("x")), api_keys=("secret",)) as server:
        api = anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0).messages
        assert api.create(**ASK).content[0].text == "x"
        with pytest.raises(anthropic.AuthenticationError):
            anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0).messages.create(**ASK)


def test_messages_body_is_checked() -> None:
    with serve("x") as server:
        status, reply, _ = server.post("/v1/messages", {"model": "m", "messages": ASK["messages"]})
        assert status == 400
        assert reply["type"] == "error"
        assert reply["error"]["type"] == "invalid_request_error"
        assert "max_tokens" in reply["error"]["message"]
