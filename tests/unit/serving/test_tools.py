"""Tools and reasoning over HTTP, with the openai client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from support.serving import THINK, UNTHINK, LiveServer, events, live, says, scripted_model
from support.turns import HERMES, HERMES_NOW, TOOLS, TURNS

HERMES_TEMPLATE = "{{ tools }} <tool_call>"
SPECS = [
    {"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in TOOLS.items()
]
BOTH = {"city": 'Köln "am" Rhein 🌧', "days": 3}


def client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(server: LiveServer, **more: Any) -> Any:
    given: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": SPECS}
    return client(server).chat.completions.create(**(given | more))


def joined(stream: Any) -> tuple[str, str, list[tuple[str, str, str]], str]:
    """(thoughts, content, [(id, name, arguments)], finish reason) of a stream, its form checked on the way."""
    thoughts = content = reason = ""
    calls: list[tuple[str, str, str]] = []
    for chunk in stream:
        for choice in chunk.choices:
            delta = choice.delta
            content += delta.content or ""
            thoughts += getattr(delta, "reasoning_content", None) or ""
            for call in delta.tool_calls or ():
                if call.id is not None:
                    assert (call.index, call.type) == (len(calls), "function")
                    calls.append((call.id, call.function.name, ""))
                else:
                    assert call.function.name is None
                    assert call.index == len(calls) - 1
                one = calls[-1]
                calls[-1] = (one[0], one[1], one[2] + call.function.arguments)
            if choice.finish_reason:
                assert not reason
                reason = choice.finish_reason
    return thoughts, content, calls, reason


# Formats whose turns can be said over HTTP without a template of their own.
SAMPLES = [turn for turn in TURNS if turn.thinking == "maybe" and turn.calls]


@pytest.fixture(scope="module")
def many() -> Iterator[LiveServer]:
    """A server with a model for each sample and size of steps."""
    models = [
        scripted_model(
            says(turn.text, size=size),
            name=f"{i}-{size}",
            tool_call_parser=turn.tools,
            reasoning_parser=turn.reasoning or "none",
        )
        for i, turn in enumerate(SAMPLES)
        for size in (1, 7, 10_000)
    ]
    with live(*models) as server:
        yield server


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("number", range(len(SAMPLES)), ids=lambda i: f"{SAMPLES[i].tools}-{i}")
def test_streamed_and_whole_replies_say_the_same(many: LiveServer, number: int, size: int) -> None:
    turn, model = SAMPLES[number], f"{number}-{size}"
    whole = ask(many, model=model).choices[0]
    streamed = joined(ask(many, model=model, stream=True))
    message = whole.message
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls]
    assert calls == turn.calls
    assert (message.content or "") == turn.content
    assert (getattr(message, "reasoning_content", None) or "") == turn.thoughts
    assert streamed[0] == turn.thoughts
    assert streamed[1] == turn.content
    assert [(name, text) for _, name, text in streamed[2]] == [
        (call.function.name, call.function.arguments) for call in message.tool_calls
    ]
    assert whole.finish_reason == streamed[3] == "tool_calls"
    ids = [call.id for call in message.tool_calls] + [one[0] for one in streamed[2]]
    if turn.tools == "kimi_k2":
        assert ids[0] == "functions.get_weather:0"
    else:
        assert len(set(ids)) == len(ids)
        assert (
            all(len(one) == 9 for one in ids) if "mistral" in str(turn.tools) else ids[0].startswith("call_")
        )


def hermes(text: str, **more: Any) -> Any:
    return live(scripted_model(says(text, size=3), template=HERMES_TEMPLATE, **more))


def test_forms_of_tool_choice() -> None:
    with hermes(HERMES) as server:
        core = server.core()
        for choice in (
            "required",
            {"type": "function", "function": {"name": "get_weather"}},
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": SPECS[:1]}},
        ):
            reply = ask(server, tool_choice=choice)
            assert reply.choices[0].finish_reason == "tool_calls"
            spec = core.requests[-1].sampling.constraint  # type: ignore[union-attr]
            assert spec is not None
            assert spec.kind == "lark"
            assert ("now" in spec.text) == (choice == "required")
        ask(server)
        assert "lazy" in core.requests[-1].sampling.constraint.text  # type: ignore[union-attr]
        reply = ask(server, tool_choice="none")
        assert core.requests[-1].sampling.constraint is None  # type: ignore[union-attr]
        assert reply.choices[0].message.content == HERMES
        assert reply.choices[0].message.tool_calls is None


@pytest.mark.parametrize(
    ("choice", "tools"),
    [
        ({"type": "function", "function": {"name": "nope"}}, SPECS),
        ({"type": "function"}, SPECS),
        ("sometimes", SPECS),
        ("required", None),
        ("auto", SPECS + SPECS),
    ],
)
def test_bad_choices_are_refused(choice: Any, tools: Any) -> None:
    with hermes("x") as server:
        with pytest.raises(openai.BadRequestError):
            ask(server, tool_choice=choice, tools=tools)
        assert not server.core().requests


WRONG = '<tool_call>{"name": "get_weather", "arguments": {"city": 5}}</tool_call>'


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_wrong_arguments_never_pass_as_right(choice: str) -> None:
    """The scripted engine follows no grammar: what a real one could not write is caught at the end."""
    with hermes(WRONG) as server:
        with pytest.raises(openai.InternalServerError, match="does not follow"):
            ask(server, tool_choice=choice)
        stream = ask(server, tool_choice=choice, stream=True)
        with pytest.raises(openai.APIError, match="does not follow"):
            joined(stream)


def test_required_without_a_call_is_an_error_and_length_says_length() -> None:
    with hermes("I would rather not.") as server:
        with pytest.raises(openai.InternalServerError, match="no tool was called"):
            ask(server, tool_choice="required")
        assert ask(server, tool_choice="required", max_tokens=4).choices[0].finish_reason == "length"
        assert ask(server).choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("parser", "right", "wrong"),
    [
        ("llama3_json", '{"name": "now", "parameters": {}}', '{"name": "get_weather", "parameters": {"city": 5}}'),
        ("pythonic", "[now()]", "[get_weather(city=5)]"),
        (
            "harmony",
            "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}<|call|>",
            '<|channel|>commentary to=functions.get_weather<|message|>{"city": 5}<|call|>',
        ),
    ],
)  # fmt: skip
def test_calls_that_begin_unmarked_are_held_to_their_schemas(parser: str, right: str, wrong: str) -> None:
    with live(scripted_model(says(right), tool_call_parser=parser)) as server:
        reply = ask(server)
        assert reply.choices[0].finish_reason == "tool_calls"
        assert [call.function.name for call in reply.choices[0].message.tool_calls] == ["now"]
        spec = server.core().requests[-1].sampling.constraint  # type: ignore[union-attr]
        assert spec is not None
        assert spec.judged is not None
    with (
        live(scripted_model(says(wrong), tool_call_parser=parser)) as server,
        pytest.raises(openai.InternalServerError, match="get_weather"),
    ):
        ask(server)  # a core that does not keep to its grammar


def test_a_call_that_the_token_limit_cuts_is_no_text() -> None:
    said = f'{HERMES}\n<tool_call>\n{{"name": "now", "argu'
    with live(scripted_model(says(said, eos=False), template=HERMES_TEMPLATE)) as server:
        for stream in (False, True):
            got = ask(server, max_tokens=len(said.encode()), stream=stream)
            if stream:
                _, content, calls, reason = joined(got)
                names = [name for _, name, _ in calls]
            else:
                choice = got.choices[0]
                content, reason = choice.message.content or "", choice.finish_reason
                names = [call.function.name for call in choice.message.tool_calls]
            assert (content.strip(), names, reason) == ("", ["get_weather"], "length")


@pytest.mark.parametrize("kind", ["array", "string", ["object", "null"]])
def test_arguments_are_objects(kind: Any) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": kind}}}
    with hermes(HERMES) as server, pytest.raises(openai.BadRequestError, match="arguments are an object"):
        ask(server, tools=[tool])


def test_one_call_where_parallel_calls_are_off() -> None:
    with hermes(f"{HERMES}\n{HERMES_NOW}") as server:
        assert len(ask(server).choices[0].message.tool_calls) == 2
        reply = ask(server, parallel_tool_calls=False)
        assert [call.function.name for call in reply.choices[0].message.tool_calls] == ["get_weather"]
        assert "left out" in reply.warnings[0]
        _, _, calls, _ = joined(ask(server, parallel_tool_calls=False, stream=True))
        assert len(calls) == 1


def test_unenforced_keywords_of_a_tool() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    text = '<tool_call>{"name": "f", "arguments": {"a": [1, 1]}}</tool_call>'
    with hermes(text) as server:
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        assert "uniqueItems" in ask(server, tools=[tool]).warnings[0]
        tool["function"]["strict"] = True  # type: ignore[index]
        with pytest.raises(openai.BadRequestError, match=r"tools\[0\]\.function\.parameters"):
            ask(server, tools=[tool])


def test_a_template_without_tools_hears_of_them_in_words() -> None:
    with live(scripted_model(says(HERMES), template="{{ messages }}")) as server:
        history = [
            {"role": "user", "content": "hi"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
                ],
            },
            {"role": "tool", "tool_call_id": "1", "content": "noon"},
        ]
        reply = ask(server, messages=history)
        assert reply.choices[0].message.tool_calls
        seen = server.state.models.find("m").engine.kit.rendered[-1]  # type: ignore[attr-defined]
        assert [message["role"] for message in seen["messages"]] == ["system", "user", "assistant", "user"]
        assert "get_weather" in seen["messages"][0]["content"]
        assert seen["messages"][2]["content"].startswith('<tool_call>\n{"name": "now"')
        assert "noon" in seen["messages"][3]["content"]
        assert seen["tools"] is None


def test_reasoning_is_apart_and_counted() -> None:
    text = "<think>\nHm, 2 < 3.\n</think>\n\nYes."
    with live(scripted_model(says(text, size=2), template="<think> </think>")) as server:
        reply = ask(server, tools=openai.NOT_GIVEN)
        assert reply.choices[0].message.reasoning_content == "Hm, 2 < 3."
        assert reply.choices[0].message.content == "Yes."
        assert reply.usage.completion_tokens_details.reasoning_tokens == 10
        assert joined(ask(server, stream=True))[:2] == ("Hm, 2 < 3.", "Yes.")
        hidden = ask(server, extra_body={"include_reasoning": False})
        assert getattr(hidden.choices[0].message, "reasoning_content", None) is None
        assert hidden.choices[0].message.content == "Yes."


def test_thinking_is_free_before_a_constrained_answer() -> None:
    with live(scripted_model(says('<think>x</think>\n{"a": 1}'), template="<think> </think>")) as server:
        format = {"type": "json_object"}
        reply = ask(server, tools=openai.NOT_GIVEN, response_format=format)
        assert json.loads(reply.choices[0].message.content) == {"a": 1}
        spec = server.core().requests[-1].sampling.constraint  # type: ignore[union-attr]
        assert (spec.free_from, spec.free_until, spec.free_tokens) == (THINK, (UNTHINK,), None)  # type: ignore[union-attr]
        ask(server, tools=openai.NOT_GIVEN, extra_body={"thinking_token_budget": 7})
        spec = server.core().requests[-1].sampling.constraint  # type: ignore[union-attr]
        assert (spec.kind, spec.free_tokens) == ("text", 7)  # type: ignore[union-attr]
    with live(scripted_model(says("x"))) as server, pytest.raises(openai.BadRequestError, match="thinks"):
        ask(server, tools=openai.NOT_GIVEN, extra_body={"thinking_token_budget": 7})


def test_an_answer_or_a_call() -> None:
    format = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "array"}}}
    with hermes(HERMES) as server:
        assert ask(server, response_format=format).choices[0].finish_reason == "tool_calls"
    with hermes("[1]") as server:
        assert ask(server, response_format=format).choices[0].message.content == "[1]"
    with hermes("neither") as server, pytest.raises(openai.InternalServerError):
        ask(server, response_format=format)
    with hermes("x") as server, pytest.raises(openai.BadRequestError, match="combined"):
        ask(server, response_format={"type": "grammar", "grammar": 'start: "x"'})


class Step(BaseModel):
    kind: Literal["step"]
    text: str


class Solution(BaseModel):
    steps: list[Step]
    answer: float | None


class get_weather(BaseModel):
    city: str
    days: int


def test_parse_with_pydantic() -> None:
    said = '{"steps": [{"kind": "step", "text": "ä"}], "answer": 1.5}'
    with live(scripted_model(says(said))) as server:
        reply = client(server).chat.completions.parse(
            model="m", messages=[{"role": "user", "content": "x"}], response_format=Solution
        )
        assert reply.choices[0].message.parsed == Solution.model_validate_json(said)
    with hermes(HERMES) as server:
        tools = [openai.pydantic_function_tool(get_weather)]
        reply = client(server).chat.completions.parse(
            model="m", messages=[{"role": "user", "content": "x"}], tools=tools
        )
        call = reply.choices[0].message.tool_calls[0]  # type: ignore[index]
        assert call.function.parsed_arguments == get_weather(**BOTH)
        with client(server).chat.completions.stream(
            model="m", messages=[{"role": "user", "content": "x"}], tools=tools
        ) as stream:
            final = stream.get_final_completion()
        assert final.choices[0].message.tool_calls[0].function.parsed_arguments == get_weather(**BOTH)  # type: ignore[index]


def test_logprobs_and_token_ids_go_once() -> None:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "x"}],
        "tools": SPECS,
        "stream": True,
        "logprobs": True,
        "return_token_ids": True,
    }
    with hermes(f"ok {HERMES}") as server:
        _, text, _ = server.post("/v1/chat/completions", body)
    ids = [i for one in events(text)[:-1] for c in one["choices"] for i in c.get("token_ids") or ()]
    assert bytes(i for i in ids if i < 256).decode() == f"ok {HERMES}"
    logged = sum(
        len(c["logprobs"]["content"]) for o in events(text)[:-1] for c in o["choices"] if c.get("logprobs")
    )
    assert logged == len(ids)
