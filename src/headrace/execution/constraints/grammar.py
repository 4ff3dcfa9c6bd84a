"""From a ConstraintSpec to an llguidance grammar: pure text work, the same in front end and core."""

from __future__ import annotations

import json
from typing import Any

from headrace.errors import InvalidRequest
from headrace.types import ConstraintSpec

__all__ = ["KINDS", "LIMITS", "WHITESPACE", "grammar_of"]

KINDS = ("json_object", "json_schema", "regex", "choice", "grammar", "lark", "structural_tag", "text")
MAX_SOURCE_BYTES = 1 << 20

# White space in JSON as models are seen to write it: one space, or a line break and an indent. Without a bound a weak
# model may write nothing else until its tokens run out.
WHITESPACE = r"( |\n[ \t]{0,32})?"
_JSON_DEFAULTS: Any = {"whitespace_pattern": WHITESPACE}

# Bounds on what one grammar may cost: a hostile one errs, it does not stall or swell the process.
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}


def grammar_of(spec: ConstraintSpec) -> str:
    """The llguidance grammar of a spec.

    Raises InvalidRequest (param ``response_format``) when the source is not what its kind expects.
    """
    from llguidance import LLMatcher

    if len(spec.text) > MAX_SOURCE_BYTES:
        raise _invalid(
            f"the {spec.kind} is {len(spec.text)} characters long; at most {MAX_SOURCE_BYTES} are taken"
        )
    match spec.kind:
        case "json_object":
            return str(
                LLMatcher.grammar_from_json_schema(spec.text or '{"type": "object"}', defaults=_JSON_DEFAULTS)
            )
        case "json_schema":
            text = spec.text
            if not text.startswith("{"):  # else the compiler reads it anyway
                schema = _json(spec)
                if not isinstance(schema, (dict, bool)):
                    raise _invalid(f"a JSON schema is an object or a boolean, not {type(schema).__name__}")
                if schema is False:
                    raise _invalid("the JSON schema cannot be enforced: false allows nothing")
                text = "{}" if schema is True else json.dumps(schema)  # options need an object
            try:
                return str(LLMatcher.grammar_from_json_schema(text, defaults=_JSON_DEFAULTS))
            except ValueError as error:
                raise _invalid(f"the JSON schema cannot be enforced: {error}") from error
        case "regex":
            return str(LLMatcher.grammar_from_regex(spec.text))
        case "choice":
            choices = _json(spec)
            if (
                not isinstance(choices, list)
                or not choices
                or not all(isinstance(c, str) and c for c in choices)
            ):
                raise _invalid("a choice is a list of one or more strings, none of them empty")
            return str(
                LLMatcher.grammar_from_lark(
                    "start: " + " | ".join(json.dumps(c, ensure_ascii=False) for c in choices)
                )
            )
        case "grammar":
            return _lark(spec.text)
        case "lark":
            return str(LLMatcher.grammar_from_lark(spec.text))
        case "text":
            return str(LLMatcher.grammar_from_lark("start: /(.|\\n)*/"))
        case "structural_tag":
            return _structural_tag(_json(spec))
    raise _invalid(f"constraint kind {spec.kind!r} is unknown; expected one of {', '.join(KINDS)}")


def _json(spec: ConstraintSpec) -> Any:
    try:
        return json.loads(spec.text)
    except (ValueError, RecursionError) as error:
        raise _invalid(f"the {spec.kind} is no valid JSON: {error}") from error


def _lark(text: str) -> str:
    """Lark as it is; GBNF (``root ::= ...``) translated."""
    from llguidance import LLMatcher

    if "::=" in text:
        from llguidance.gbnf_to_lark import any_to_lark

        try:
            text = any_to_lark(text)
        except Exception as error:
            raise _invalid(f"the grammar is neither Lark nor GBNF: {error}") from error
    return str(LLMatcher.grammar_from_lark(text))


def _structural_tag(tag: Any) -> str:
    """OpenAI-compatible ``{"structures": [{begin, schema, end}], "triggers": [...]}``."""
    from llguidance import LLMatcher, StructTag

    try:
        triggers = [str(t) for t in tag["triggers"]]
        tags = [
            StructTag(
                trigger=next(t for t in triggers if structure["begin"].startswith(t)),
                begin=structure["begin"],
                grammar=structure["schema"],
                end=structure["end"],
            )
            for structure in tag["structures"]
        ]
        return str(LLMatcher.grammar_from_lark(StructTag.to_grammar(tags, assume_special=False)))
    except (KeyError, TypeError, StopIteration, AssertionError, AttributeError) as error:
        raise _invalid(
            "a structural_tag needs 'triggers' (strings) and 'structures' (each with begin, schema, end, and begin "
            f"starting with a trigger): {type(error).__name__} {error}"
        ) from error


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(message, param="response_format")
