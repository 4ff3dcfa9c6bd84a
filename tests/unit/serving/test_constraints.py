"""Structured output in the front end: what is asked for is enforced, warned of, or refused by name."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import Any

import pytest

from headrace.errors import InvalidRequest
from headrace.execution.constraints.judge_child import Compiler
from headrace.execution.constraints.schema_report import read_schema
from headrace.serving.constraints import json_schema
from headrace.serving.grammars import GrammarChecker
from headrace.types import ConstraintSpec
from support.serving import events, live, says, scripted_model

ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
    "required": ["x", "y"],
    "additionalProperties": False,
}


def schema_format(schema: Any, strict: bool | None = None) -> dict[str, Any]:
    inner = {"name": "answer", "schema": schema} | ({} if strict is None else {"strict": strict})
    return {"response_format": {"type": "json_schema", "json_schema": inner}}


ACCEPTED: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "json_object"}}, "json_object", '{"a": [1, null]}'),
    (schema_format(POINT, True), "json_schema", '{"x": 1, "y": -2}'),
    (schema_format(POINT), "json_schema", '{"x":1,"y":2}'),
    (schema_format(True, True), "json_schema", "[1, null]"),
    ({"response_format": {"type": "regex", "regex": "[ab]+"}}, "regex", "abba"),
    ({"response_format": {"type": "choice", "choice": ["yes", "no"]}}, "choice", "no"),
    ({"response_format": {"type": "grammar", "grammar": 'start: "a"+'}}, "grammar", "aaa"),
    ({"response_format": {"type": "grammar", "grammar": 'root ::= "a" root | "b"'}}, "grammar", "aab"),
    ({"guided_json": POINT}, "json_schema", '{"x": 1, "y": 2}'),
    ({"guided_json": json.dumps(POINT)}, "json_schema", '{"x": 1, "y": 2}'),
    ({"guided_regex": "x{2}"}, "regex", "xx"),
    ({"guided_choice": ["a", "b"]}, "choice", "b"),
    ({"guided_grammar": 'start: "q"'}, "grammar", "q"),
    ({"json_schema": json.dumps(POINT)}, "json_schema", '{"x": 1, "y": 2}'),
    ({"regex": "x{2}"}, "regex", "xx"),
    ({"ebnf": 'root ::= "q"'}, "grammar", "q"),
    ({"structured_outputs": {"choice": ["a", 'é\n"']}}, "choice", 'é\n"'),
    ({"structured_outputs": {"json": POINT}}, "json_schema", '{"x": 1, "y": 2}'),
    (
        {
            "response_format": {
                "type": "structural_tag",
                "triggers": ["<p>"],
                "structures": [{"begin": "<p>", "schema": POINT, "end": "</p>"}],
            }
        },
        "structural_tag",
        'at <p>{"x": 1, "y": 2}</p> there',
    ),
]


@pytest.mark.parametrize(("extra", "kind", "answer"), ACCEPTED, ids=lambda value: str(value)[:60])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_each_form_reaches_the_engine_and_a_right_answer_passes(
    extra: dict[str, Any], kind: str, answer: str, path: str
) -> None:
    ask = ASK if "chat" in path else {"model": "m", "prompt": "p", "max_tokens": 99}
    with live(scripted_model(says(answer))) as server:
        status, reply, headers = server.post(path, ask | extra)
        assert status == 200, reply
        choice = reply["choices"][0]
        assert (choice["message"]["content"] if "chat" in path else choice["text"]) == answer
        assert "x-headrace-warnings" not in headers
        assert "warnings" not in reply
        spec = server.core().requests[-1].sampling.constraint  # type: ignore[union-attr]
        assert spec is not None
        assert spec.kind == kind


@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_answer_never_finishes(stream: bool) -> None:
    """The scripted engine follows no grammar, so what it says must be caught."""
    with live(scripted_model(says('{"x": 1, "y": "two"}', size=5))) as server:
        status, reply, _ = server.post(
            "/v1/chat/completions", ASK | schema_format(POINT) | {"stream": stream}
        )
        if stream:
            last = events(reply)[-1]
            assert last["error"]["code"] == "constraint_violated"
            assert not any(c["choices"][0]["finish_reason"] for c in events(reply)[:-1])
        else:
            assert status == 500
            assert reply["error"]["code"] == "constraint_violated"


def test_cut_by_length_says_length_and_by_a_stop_string_warns() -> None:
    with live(scripted_model(says('{"x": 1, "y": 2}'))) as server:
        body = ASK | schema_format(POINT)
        _, reply, _ = server.post("/v1/chat/completions", body | {"max_tokens": 4})
        assert reply["choices"][0]["finish_reason"] == "length"
        assert "warnings" not in reply
        _, reply, headers = server.post("/v1/chat/completions", body | {"stop": "y"})
        assert reply["choices"][0]["finish_reason"] == "stop"
        assert "cut by a stop" in reply["warnings"][0]
        assert "cut by a stop" in headers["x-headrace-warnings"]
        _, text, _ = server.post("/v1/chat/completions", body | {"stop": "y", "stream": True})
        assert any("warnings" in one for one in events(text)[:-1])


UNENFORCED = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}


def test_an_unenforced_keyword_is_refused_under_strict_and_told_otherwise() -> None:
    with live(scripted_model(says("[1, 1]"))) as server:
        status, reply, _ = server.post("/v1/chat/completions", ASK | schema_format(UNENFORCED, True))
        assert status == 400
        assert reply["error"]["param"] == "response_format.json_schema.schema"
        assert "uniqueItems" in reply["error"]["message"]
        assert not server.core().requests
        status, reply, headers = server.post("/v1/chat/completions", ASK | schema_format(UNENFORCED))
        assert status == 200
        assert "uniqueItems" in reply["warnings"][0]
        assert "uniqueItems" in headers["x-headrace-warnings"]
        _, text, headers = server.post(
            "/v1/chat/completions", ASK | schema_format(UNENFORCED) | {"stream": True}
        )
        assert "uniqueItems" in headers["x-headrace-warnings"]
        assert any("uniqueItems" in str(one.get("warnings")) for one in events(text)[:-1])


REFUSED: list[tuple[dict[str, Any], str]] = [
    (schema_format({"type": "strin"}), "response_format.json_schema.schema"),
    (schema_format(False), "response_format.json_schema.schema"),
    (schema_format([1]), "response_format.json_schema.schema"),
    (schema_format({"$ref": "http://elsewhere/"}), "response_format.json_schema.schema"),
    (schema_format({"x-guidance": {"lenient": True}, "not": {}}), "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "regex", "regex": "("}}, "response_format.regex"),
    ({"response_format": {"type": "regex"}}, "response_format.regex"),
    ({"guided_regex": "(?=a)b"}, "guided_regex"),
    ({"guided_grammar": "start: ("}, "guided_grammar"),
    ({"guided_grammar": "start: " + "(" * 5000}, "guided_grammar"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_choice"),
    ({"guided_json": "{"}, "guided_json"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"jason": {}}}, "structured_outputs"),
    ({"response_format": {"type": "structural_tag", "structures": []}}, "response_format"),
    (
        {"structural_tag": {"triggers": ["<a"], "structures": [{"begin": "b", "schema": {}, "end": ""}]}},
        "structural_tag",
    ),
]


def test_what_cannot_be_enforced_is_refused_by_field() -> None:
    with live(scripted_model(says("x"))) as server:
        for extra, param in REFUSED:
            status, reply, _ = server.post("/v1/chat/completions", ASK | extra)
            assert status == 400, (extra, reply)
            assert reply["error"]["param"] == param, (extra, reply)
        assert not server.core().requests


@pytest.mark.parametrize(
    ("schema", "keywords"),
    [
        (POINT, []),
        ({"not": {}}, ["not"]),
        ({"properties": {"not": {"type": "string"}, "if": {}}}, []),
        ({"properties": {"a": {"items": [{"contains": {}}]}}}, ["contains"]),
        ({"type": "string", "format": "date-time"}, []),
        ({"type": "string", "format": "iri"}, ["format"]),
        ({"oneOf": [{"type": "string"}, {"type": "integer"}]}, []),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, ["oneOf"]),
        ({"oneOf": [{"const": "a"}, {"enum": ["b", "c"]}]}, []),
        ({"enum": ["a"], "bananas": 1}, ["bananas"]),
    ],
)
def test_report_names_what_is_not_enforced(schema: Any, keywords: list[str]) -> None:
    assert [keyword for _, keyword, _ in read_schema(schema, "p").unenforced] == keywords


def test_tagged_unions_are_exclusive() -> None:
    """As pydantic writes them: oneOf references with a discriminating constant."""

    def branch(tag: str) -> dict[str, Any]:
        return {"type": "object", "properties": {"kind": {"const": tag}}, "required": ["kind"]}

    refs = [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}]
    schema = {"$defs": {"A": branch("a"), "B": branch("b")}, "oneOf": refs}
    assert read_schema(schema, "p").schema["anyOf"] == refs
    assert not read_schema(schema, "p").unenforced
    schema["$defs"]["B"] = branch("a")  # type: ignore[index]
    assert read_schema(schema, "p").unenforced


@pytest.mark.parametrize("depth", [101, 400])
def test_endless_nesting_is_refused(depth: int) -> None:
    schema: Any = {}
    for _ in range(depth):
        schema = {"items": schema}
    with pytest.raises(InvalidRequest, match="nested"):
        read_schema(schema, "p")


@pytest.fixture(scope="module")
def loop() -> Any:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.mark.parametrize(
    ("format", "right", "wrong"),
    [
        ("date", ["2024-02-29", "2000-02-29", "1999-12-31"], ["2023-02-29", "1900-02-29", "2020-13-01"]),
        ("time", ["08:30:06Z", "23:59:59.25+01:00"], ["24:00:00Z", "08:30:06", "22:59:60Z"]),
        ("date-time", ["2024-02-29T08:30:06Z"], ["2023-02-29T08:30:06Z", "2024-02-29 08:30:06Z"]),
    ],
)
def test_dates_are_real(loop: Any, format: str, right: list[str], wrong: list[str]) -> None:
    wanted = json_schema({"type": "string", "format": format, "minLength": 9}, "p", strict=True)

    async def judge() -> None:
        checker = GrammarChecker(children=1)
        await checker.check(wanted.spec, "p")
        for text in right:
            assert not await checker.match(wanted.spec, json.dumps(text)), text
        for text in wrong:
            assert await checker.match(wanted.spec, json.dumps(text)), text
        await checker.close()

    loop.run_until_complete(judge())


def test_a_child_that_hangs_or_dies_costs_its_own_request(loop: Any) -> None:
    async def judge() -> None:
        checker = GrammarChecker(seconds=0.3, children=1)
        good = ConstraintSpec("regex", "a+")
        await checker.check(good, "p")
        child = checker._judges[0]
        assert child._process is not None
        os.kill(child._process.pid, signal.SIGSTOP)  # as if it never came back
        with pytest.raises(InvalidRequest, match=r"over 0\.3 s"):
            await checker.check(ConstraintSpec("regex", "b+"), "p")
        await checker.check(ConstraintSpec("regex", "b+"), "p")  # not held against it
        os.kill(checker._judges[0]._process.pid, signal.SIGKILL)  # type: ignore[union-attr]
        await asyncio.sleep(0.1)
        assert "leaves" in await checker.match(good, "ab")
        assert not await checker.match(good, "aaa")
        assert "ends before" in await checker.match(good, "")
        await checker.close()

    loop.run_until_complete(judge())


WRONG_BUT_TEMPTING: list[tuple[Any, str]] = [
    ({"type": "object", "properties": {"a": {"type": "integer"}}}, '{"\\u0061": "x"}'),
    ({"type": "object", "properties": {"a": {"type": "integer"}}}, '{"a": 1, "a": "x"}'),
    ({"type": "object", "properties": {"a": {"type": "integer"}}}, '{"b": 1, "\\u0061": "x"}'),
    ({"type": "object", "patternProperties": {"^a": {"type": "integer"}}}, '{"\\u0061b": "x"}'),
    ({"type": "object", "minProperties": 2}, '{"a": 1, "a": 2}'),
    ({"type": "integer", "minimum": 9007199254740993}, "9007199254740992"),
    ({"type": "integer", "maximum": 9007199254740993}, "9007199254740994"),
    ({"enum": ["\u0001"], "anyOf": [{"properties": {"a": False}}]}, '{"\\u0061": 1}'),
]


@pytest.mark.parametrize(("schema", "wrong"), WRONG_BUT_TEMPTING, ids=lambda value: str(value)[:60])
def test_under_strict_a_wrong_answer_is_refused_or_the_schema_is(schema: Any, wrong: str) -> None:
    lenient = json_schema(schema, "p", strict=False)
    if lenient.warnings:
        with pytest.raises(InvalidRequest, match="cannot be enforced strictly"):
            json_schema(schema, "p", strict=True)
    else:
        assert Compiler().match(json_schema(schema, "p", strict=True).spec, wrong)


def test_what_is_still_enforced_is_not_refused() -> None:
    compiler = Compiler()
    for schema, right in (
        ({"type": "object", "properties": {"a": {"type": "integer"}}}, '{"a": 1, "b\\n": "x"}'),
        ({"type": "object", "minProperties": 1}, '{"a": 1}'),
        ({"type": "object", "minProperties": 2, "required": ["a", "b"]}, '{"a": 1, "b": 2}'),
        ({"enum": ["\u0001"]}, '"\\u0001"'),
    ):
        assert not compiler.match(json_schema(schema, "p", strict=True).spec, right), schema
    with pytest.raises(InvalidRequest, match="schema"):
        json_schema({"$schema": 5}, "p", strict=False)


@pytest.mark.parametrize(
    "extra",
    [{"guided_choice": ["a", "<named>"]}, schema_format({"const": "x <named>"}), {"guided_regex": "<eos>"}],
)
def test_the_text_of_a_special_token_is_no_text(extra: dict[str, Any]) -> None:
    with live() as server:
        status, reply, _ = server.post("/v1/chat/completions", ASK | extra)
        assert status == 400
        assert "special token" in reply["error"]["message"]
