"""Hostile and random schemas, regexes and grammars: refused by name or enforced, and never anybody else's trouble."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from typing import Any

import pytest

from headrace.errors import InvalidRequest
from headrace.serving.constraints import json_schema
from headrace.serving.grammars import GrammarChecker
from headrace.types import ConstraintSpec
from support.serving import live, says, scripted_model

ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


def nested(levels: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema, "b": schema}}
    return schema


HOSTILE: list[dict[str, Any]] = [
    {"guided_regex": "(a+)+$"},
    {"guided_regex": "((((a{1,100}){1,100}){1,100}){1,100})"},
    {"guided_regex": "(" * 2000 + "a" + ")" * 2000},
    {"guided_regex": "a{1000000000}"},
    {"guided_regex": "(x|xx|xxx|xxxx)*" * 300},
    {"guided_regex": "\\p{L}{1,5000}[^a]{3,4000}" * 20},
    {"guided_regex": "\x00\\uD800"},
    {"guided_grammar": "start: start"},
    {"guided_grammar": "start: a\na: b\nb: a | a a | b b"},
    {"guided_grammar": 'start: ("a" | "b"?)*' * 50},
    {"guided_grammar": "root ::= root root | " + " | ".join(f'"{i}"' for i in range(3000))},
    {"guided_grammar": "start: " + "(" * 100_000},
    {"guided_grammar": '%llguidance {"no": 1}\nstart: /x/'},
    {"guided_grammar": "start: @nothing"},
    {"guided_grammar": 'start: %json {"type": "strin"}'},
    {"guided_grammar": "start: <|eot_id|>"},
    {"guided_grammar": "::="},
    {"guided_json": {"$ref": "#"}},
    {"guided_json": {"$ref": "#/properties/a", "properties": {"a": {"$ref": "#"}}}},
    {"guided_json": {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 50}}, "$ref": "#/$defs/a"}},
    {"guided_json": nested(12)},
    {"guided_json": {"allOf": [{"pattern": f"a{{{i},}}b*"} for i in range(60)], "type": "string"}},
    {"guided_json": {"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$", "minLength": 5000}},
    {"guided_json": {"type": "array", "minItems": 10**9}},
    {"guided_json": {"type": "string", "minLength": 10**12}},
    {"guided_json": {"enum": ["x" * 1000 + str(i) for i in range(800)]}},
    {"guided_json": {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(3000)}}},
    {"guided_json": {"multipleOf": 1e-300, "type": "number"}},
    {"guided_json": {"minimum": 1e308, "maximum": -1e308, "type": "integer"}},
    {"guided_json": {"properties": 5, "items": "x", "required": {}, "type": ["string", 3]}},
    {"guided_json": {"patternProperties": {"(": {}, "a+": 7}}},
    {"guided_choice": ["x" * 100_000]},
    {"structural_tag": {"triggers": [""], "structures": [{"begin": "", "schema": {}, "end": ""}]}},
    {
        "structural_tag": {
            "triggers": ["<"],
            "structures": [{"begin": "<", "schema": nested(9), "end": "/\\n"}],
        }
    },
]


@pytest.mark.timeout(600)  # half a minute for each that gets no processor
def test_hostile_grammars_over_http_disturb_nobody() -> None:
    with live(scripted_model(says("ok", eos=False))) as server:
        stop = threading.Event()
        others: list[int] = []

        def bystander() -> None:
            while not stop.wait(0.01):  # grammars are judged in what others leave of the machine
                others.append(server.post("/v1/chat/completions", ASK)[0])

        thread = threading.Thread(target=bystander)
        thread.start()
        try:
            for extra in HOSTILE:
                data = json.dumps(ASK | extra).encode("utf-8", "surrogatepass")
                status, reply, _ = server.post("/v1/chat/completions", data)
                busy = status == 429 and "all processors are busy" in reply["error"]["message"]  # the machine
                assert status in (200, 400) or busy, (str(extra)[:100], reply)
                if status == 400:
                    assert reply["error"]["param"], reply
        finally:
            stop.set()
            thread.join(20)
        assert len(others) > 20 and set(others) == {200}


ATOMS = [
    *list("abc().*+?[]{}|^$\\/\"'<>:@%~-_ \n0159é\x00"),
    "start: ",
    "root ::= ",
    "a: ",
    "[lazy]",
    "{1,9}",
    "\\d",
]
VALUES: list[Any] = [None, True, 0, -1, 2.5, 10**20, "", "a", "^a$", "(", [], {}, ["a"], [1, "x"], {"a": 1}]
KEYWORDS = [
    *(
        "type",
        "enum",
        "const",
        "properties",
        "required",
        "additionalProperties",
        "patternProperties",
        "items",
    ),
    *(
        "prefixItems",
        "minimum",
        "maximum",
        "multipleOf",
        "minLength",
        "maxLength",
        "pattern",
        "format",
        "$ref",
    ),
    *(
        "minItems",
        "maxItems",
        "minProperties",
        "maxProperties",
        "anyOf",
        "allOf",
        "oneOf",
        "not",
        "if",
        "$defs",
        "x",
    ),
]


def random_schema(rng: random.Random, depth: int = 0) -> Any:
    if depth > 3 or rng.random() < 0.2:
        return rng.choice([*VALUES, True, {"type": "string"}, {"type": "integer"}])
    schema: dict[str, Any] = {}
    for keyword in rng.sample(KEYWORDS, rng.randint(1, 4)):
        match keyword:
            case "properties" | "patternProperties" | "$defs":
                schema[keyword] = {rng.choice("ab^"): random_schema(rng, depth + 1) for _ in range(2)}
            case "anyOf" | "allOf" | "oneOf" | "prefixItems":
                schema[keyword] = [random_schema(rng, depth + 1) for _ in range(rng.randint(0, 3))]
            case "items" | "additionalProperties" | "not" | "if":
                schema[keyword] = random_schema(rng, depth + 1)
            case "type":
                schema[keyword] = rng.choice(
                    ["string", "integer", "object", "array", "number", "null", "any"]
                )
            case "$ref":
                schema[keyword] = rng.choice(["#", "#/$defs/a", "#/x", "http://a/b", "", 5])
            case _:
                schema[keyword] = rng.choice(VALUES)
    return schema


def random_text(rng: random.Random) -> str:
    return "".join(rng.choice(ATOMS) for _ in range(rng.randint(1, 40)))


async def judge(count: int, seed: int) -> tuple[int, int]:
    """How many were taken and refused; anything else is raised."""
    rng = random.Random(seed)
    checker = GrammarChecker()
    taken = refused = 0
    try:
        for number in range(count):
            try:
                if number % 3 == 0:
                    wanted = json_schema(random_schema(rng), "p", strict=rng.random() < 0.5)
                    await checker.check(wanted.spec, "p")
                else:
                    kind = "regex" if number % 3 == 1 else "grammar"
                    await checker.check(ConstraintSpec(kind, random_text(rng)), "p")
                taken += 1
            except InvalidRequest:
                refused += 1
    finally:
        await checker.close()
    return taken, refused


@pytest.mark.parametrize(
    "count", [300, pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_random_grammars_are_taken_or_refused(count: int) -> None:
    taken, refused = asyncio.run(judge(count, 11))
    assert taken > count // 20
    assert refused > count // 20
