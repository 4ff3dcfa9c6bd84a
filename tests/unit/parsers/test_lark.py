"""What a format's grammar lets a model write, its parser reads as calls that follow their schemas."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest

from headrace.execution.constraints.judge_child import ByteVocabulary
from headrace.serving.parsers.formats import TOOLS as FORMATS
from headrace.serving.parsers.formats import build
from headrace.serving.parsers.grammar import Format
from headrace.serving.parsers.lark import ToolGrammar, writable
from headrace.serving.parsers.machine import Machine
from headrace.serving.parsers.turn import Turn
from support.turns import TURNS

TOOLS: dict[str, Any] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"enum": ["Köln", 'a "b"\n']},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "exact": {"type": "boolean"},
            "where": {"$ref": "#/$defs/where"},
        },
        "required": ["days"],
        "additionalProperties": False,
        "$defs": {
            "where": {
                "type": "object",
                "properties": {"ok": {"type": "boolean"}, "none": {"type": "null"}},
                "additionalProperties": False,
            }
        },
    },
    "now": {"type": "object", "properties": {}, "additionalProperties": False},
}
NAMES = [*FORMATS, "harmony"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(ByteVocabulary()))


def matcher_of(lark: str, tokenizer: Any) -> Any:
    from llguidance import LLMatcher

    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(lark), log_level=0)
    assert not matcher.is_error(), (matcher.get_error(), lark)
    return matcher


def walk(matcher: Any, rng: random.Random, limit: int = 1500) -> str | None:
    """A random text of the grammar; spaces and line breaks rarely, or JSON would be all space."""
    data = bytearray()
    for _ in range(limit):
        bits = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [i for i in range(257) if bits >> i & 1]
        if 256 in allowed and (len(allowed) == 1 or rng.random() < 0.5):
            return data.decode()
        solid = [i for i in allowed if i not in (256, *b" \t\r\n")]
        token = rng.choice(solid or [i for i in allowed if i != 256])
        data.append(token)
        assert matcher.consume_token(token)
    return None


def parse(name: str, text: str) -> tuple[str, list[tuple[str, Any]]]:
    format = build(name, "harmony" if name == "harmony" else None)
    turn = Turn(Machine(format, TOOLS))
    turn.feed(text, last=True)
    assert all(call.whole for call in turn.calls), text
    return turn.content, [(call.name, json.loads(call.arguments)) for call in turn.calls]


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_random_walks_are_right_calls(name: str, parallel: bool, tokenizer: Any) -> None:
    format = build(name, None)
    lark = ToolGrammar(format, TOOLS, lambda text: None).forced(parallel=parallel)
    fresh = matcher_of(lark, tokenizer)
    rng = random.Random(name)
    found = 0
    for _ in range(8):
        text = walk(fresh.deep_copy(), rng)
        if text is None or (name == "harmony" and "text" in text):
            continue
        content, calls = parse(name, text)
        assert calls, text
        assert name == "harmony" or not content.strip(), text
        assert parallel or len(calls) == 1, text
        for tool, arguments in calls:
            jsonschema.validate(arguments, TOOLS[tool])
        found += 1
    assert found >= (1 if name == "harmony" else 6)


FREE: dict[str, Any] = {
    "get_weather": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
    "now": {"type": "object", "properties": {}},
}


@pytest.mark.parametrize("name", [name for name in FORMATS if not FORMATS[name].section.bare])
def test_triggered_takes_samples_and_refuses_wrong_arguments(name: str, tokenizer: Any) -> None:
    lark = ToolGrammar(build(name, None), FREE, lambda text: None).triggered(parallel=True)
    assert lark is not None
    fresh = matcher_of(lark, tokenizer)
    taken = 0
    for turn in TURNS:
        if (
            turn.tools != name
            or turn.reasoning is not None
            or (not turn.text.isprintable() and not turn.calls)
        ):
            continue
        data = list(turn.text.encode())
        copy = fresh.deep_copy()
        if copy.try_consume_tokens(data) == len(data) and copy.is_accepting():
            taken += bool(turn.calls)
            if turn.calls and ": 3" in turn.text and name != "gemma":
                wrong = list(turn.text.replace(": 3", ': "3"').encode())
                assert fresh.deep_copy().try_consume_tokens(wrong) < len(wrong), turn.text
    assert taken >= 1, lark
    plain = list(b"Nothing to call here < at all.")
    copy = fresh.deep_copy()
    assert copy.try_consume_tokens(plain) == len(plain)
    assert copy.is_accepting()


def test_bare_texts_of_optional_and_referenced_schemas(tokenizer: Any) -> None:
    schema = {
        "$ref": "#/$defs/root",
        "$defs": {
            "root": {
                "type": "object",
                "properties": {
                    "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                    "colour": {"$ref": "#/$defs/colour"},
                },
                "required": ["note"],
            },
            "colour": {"enum": ["red", "blue"], "type": "string"},
        },
    }
    for name, text, expected in (
        ("qwen3_coder", 'hi "you"', {"note": 'hi "you"'}),
        ("qwen3_coder", "null", {"note": None}),
        ("qwen3_coder", 'x\n</parameter>\n<parameter=colour>\n"red"', {"note": "x", "colour": "red"}),
    ):
        said = f"<tool_call>\n<function=f>\n<parameter=note>\n{text}\n</parameter>\n</function>\n</tool_call>"
        matcher = matcher_of(
            ToolGrammar(build(name, None), {"f": schema}, no_special).forced(parallel=True), tokenizer
        )
        assert matcher.try_consume_tokens(list(said.encode())) == len(said.encode()), said
        assert matcher.is_accepting()
        turn = Turn(Machine(build(name, None), {"f": schema}))
        turn.feed(said, last=True)
        assert json.loads(turn.calls[0].arguments) == expected


def no_special(text: str) -> int | None:
    return None


def test_what_a_format_cannot_write_is_known() -> None:
    union = {"anyOf": [{"type": "object"}, {"type": "object"}]}
    named = {"type": "object", "properties": {"a": {}}, "required": ["a"]}
    for name in FORMATS:
        tagged = name in ("qwen3_coder", "glm4_moe", "pythonic", "gemma", "gemma4")
        assert writable(build(name, None), union) is not tagged
        assert writable(build(name, None), named)
        assert writable(build(name, None), {**named, "required": ["b"]}) is not tagged


def test_special_tokens_are_named_by_id() -> None:
    ids = {"[TOOL_CALLS]": 5, "[ARGS]": 6}
    lark = ToolGrammar(build("mistral_args", None), FREE, ids.get).triggered(parallel=True)
    assert lark is not None
    assert "<[5]>" in lark
    assert "<[6]>" in lark
    assert "[TOOL_CALLS]" not in lark


def test_a_format_without_tools_has_no_trigger() -> None:
    assert ToolGrammar(Format(), FREE, lambda text: None).triggered(parallel=True) is None


SPECIALS = (
    "<|start|>",
    "<|channel|>",
    "<|constrain|>",
    "<|message|>",
    "<|end|>",
    "<|python_tag|>",
    "[CALL_ID]",
)


class SpecialVocabulary(ByteVocabulary):
    """Bytes, an end, and the markers of some formats as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = [*self.tokens[:257], *(text.encode() for text in SPECIALS)]
        self.special_token_ids = [256, *range(257, 257 + len(SPECIALS))]


def special_id(text: str) -> int | None:
    return 257 + SPECIALS.index(text) if text in SPECIALS else None


def tokens_of(text: str) -> list[int]:
    found: list[int] = []
    while text:
        marker = next((one for one in SPECIALS if text.startswith(one)), None)
        if marker is None:
            found += text[0].encode()
            text = text[1:]
        else:
            found.append(257 + SPECIALS.index(marker))
            text = text[len(marker) :]
    return found


def takes(lark: str, text: str) -> bool:
    from llguidance import LLTokenizer, TokenizerWrapper

    matcher = matcher_of(lark, LLTokenizer(TokenizerWrapper(SpecialVocabulary())))
    given = tokens_of(text)
    return bool(matcher.try_consume_tokens(given) == len(given) and matcher.is_accepting())


CALL = '{"name": "get_weather", "parameters": {"city": "Rome", "days": 3}}'
WRONG = CALL.replace("3", '"3"')
ANALYSIS = "<|channel|>analysis<|message|>Hm, to think.<|end|><|start|>assistant"
PREAMBLE = "<|channel|>commentary<|message|>I'll look.<|end|><|start|>assistant"
TO = " to=functions.get_weather"
BEGUN: list[tuple[str, str, bool]] = [
    ("llama3_json", "Nothing to call.", True),
    ("llama3_json", '{"name": "Rome", "parameters": 5}', True),  # no tool of that name: an answer
    ("llama3_json", '{"city": 3}', True),
    ("llama3_json", CALL, True),
    ("llama3_json", WRONG, False),
    ("llama3_json", CALL.replace(" ", ""), True),
    ("llama3_json", WRONG.replace(" ", ""), False),
    ("llama3_json", "\n{ " + WRONG[1:], False),
    ("llama3_json", '{"type": "function", ' + CALL[1:], True),
    ("llama3_json", '{"type": "function", ' + WRONG[1:], False),
    ("llama3_json", f"{CALL}; {CALL}", True),
    ("llama3_json", f"{CALL}; {WRONG}", False),
    ("llama3_json", f"Let me see.<|python_tag|>{CALL}", True),
    ("llama3_json", f"Let me see.<|python_tag|>{WRONG}", False),
    ("pythonic", "[1, 2] is a list", True),
    ("pythonic", '[get_weather(city="Rome", days=3), now()]', True),
    ("pythonic", '[get_weather(city="Rome", days="3")]', False),
    ("pythonic", "[now(), get_weather(city=5)]", False),
    ("pythonic", "[now(1)]", False),
    ("harmony", "<|channel|>final<|message|>Hello.", True),
    ("harmony", f"{ANALYSIS}<|channel|>final<|message|>Hello.", True),
    ("harmony", f"{ANALYSIS}{PREAMBLE}<|channel|>final<|message|>x", True),
    ("harmony", '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Rome"}', True),
    ("harmony", '<|channel|>commentary to=functions.get_weather<|message|>{"city": "Rome"}', True),
    ("harmony", f'{ANALYSIS}{TO}<|channel|>commentary <|constrain|>json<|message|>{{"city": "Rome"}}', True),
    ("harmony", f'{ANALYSIS}{TO}<|channel|>commentary <|constrain|>json<|message|>{{"city": 5}}', False),
    ("harmony", '<|channel|>commentary to=functions.other <|constrain|>json<|message|>{"city": "Rome"}', False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "right"), BEGUN, ids=lambda value: str(value)[:50])
def test_a_call_once_begun_follows_its_schema(name: str, text: str, right: bool) -> None:
    format = build(name, "harmony" if name == "harmony" else None)
    lark = ToolGrammar(format, FREE, special_id).triggered(parallel=True)
    assert lark is not None
    assert takes(lark, text) is right, lark
    if right:  # what the grammar takes for a call the parser does too
        turn = Turn(Machine(format, FREE))
        turn.feed(text, last=True)
        assert all(call.whole for call in turn.calls)
        for call in turn.calls:
            jsonschema.validate(json.loads(call.arguments), FREE[call.name])
        assert bool(turn.calls) is ("get_weather" in text), turn.calls


def test_an_answer_in_harmony_follows_its_grammar_whatever_its_header() -> None:
    lark = ToolGrammar(build("harmony", "harmony"), {}, special_id).forced(parallel=False, instead="/[0-9]+/")
    for header in ("final", "final <|constrain|>json"):
        assert takes(lark, f"{ANALYSIS}<|channel|>{header}<|message|>42")
        assert not takes(lark, f"{ANALYSIS}<|channel|>{header}<|message|>x")


def test_mistral_with_and_without_ids_of_calls() -> None:
    format = build("mistral_args", None)
    for identity in ("", "[CALL_ID]a1B2c3D4e"):
        text = f'[TOOL_CALLS]now{identity}[ARGS]{{}}[TOOL_CALLS]get_weather{identity}[ARGS]{{"city": "x"}}'
        assert takes(ToolGrammar(format, FREE, special_id).forced(parallel=True), text)
        turn = Turn(Machine(format, FREE), short_ids=True)
        for char in text:
            turn.feed(char)
        turn.feed("", last=True)
        assert [(call.name, call.arguments) for call in turn.calls] == [
            ("now", "{}"),
            ("get_weather", '{"city": "x"}'),
        ]
        assert all(len(call.id) == 9 for call in turn.calls)
        assert not identity or {call.id for call in turn.calls} == {"a1B2c3D4e"}
