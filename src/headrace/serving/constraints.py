"""The one place where request fields become a ConstraintSpec for the engine: checked, or refused by name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec

from headrace.errors import InvalidRequest, nearest
from headrace.execution.constraints.schema_report import enforceable
from headrace.serving.grammars import GrammarChecker
from headrace.types import ConstraintSpec

if TYPE_CHECKING:
    from headrace.serving.openai.common import GenerateFields

__all__ = ["Constrained", "constrain", "json_schema"]

_FORMATS = ("text", "json_object", "json_schema", "regex", "choice", "grammar", "structural_tag")
_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
    "regex": "regex",
    "ebnf": "grammar",
    "structural_tag": "structural_tag",
}
_STRUCTURED = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")
_SWITCHES = (
    "disable_fallback",
    "disable_any_whitespace",
    "disable_additional_properties",
    "whitespace_pattern",
)


class Constrained(msgspec.Struct, frozen=True):
    """What a request's output must follow.

    Attributes:
        spec: for the engine.
        param: the request field that asked for it.
        warnings: what is asked for and not enforced.
    """

    spec: ConstraintSpec
    param: str
    warnings: tuple[str, ...] = ()


async def constrain(body: GenerateFields, checker: GrammarChecker) -> Constrained | None:
    """The grammar that a request asks for, compiled once in a child process; None: free text.

    Raises InvalidRequest naming the field, with the compiler's reason.
    """
    wanted = await _read(body, checker)
    if wanted is None:
        return None
    return msgspec.structs.replace(wanted, spec=await checker.check(wanted.spec, wanted.param))


async def _read(body: GenerateFields, checker: GrammarChecker) -> Constrained | None:
    """The same without compiling."""
    found = [("response_format", body.response_format)] if body.response_format is not None else []
    found += [(name, value) for name in _GUIDED if (value := getattr(body, name)) is not None]
    if body.structured_outputs is not None:
        found.append(("structured_outputs", body.structured_outputs))
    asking = [
        (name, value) for name, value in found if name != "response_format" or value.get("type") != "text"
    ]
    if len(asking) > 1:
        names = " and ".join(name for name, _ in asking)
        raise InvalidRequest(f"{names} exclude each other; give one", param=asking[1][0])
    if not found:
        return None
    name, value = (asking or found)[0]
    if name == "response_format":
        return await _response_format(value, checker)
    if name == "structured_outputs":
        return await _structured(value, checker)
    return await _of_kind(_GUIDED[name], value, name, checker)


async def _response_format(given: dict[str, Any], checker: GrammarChecker) -> Constrained | None:
    kind = given.get("type")
    if not isinstance(kind, str) or kind not in _FORMATS:
        raise InvalidRequest(
            f"response_format.type is {kind!r}; expected one of {', '.join(_FORMATS)}"
            f"{nearest(str(kind), _FORMATS)}",
            param="response_format.type",
        )
    if kind == "text":
        return None
    if kind == "json_object":
        if given.get("schema") is not None:
            return await _schema(given["schema"], "response_format.schema", False, checker)
        return Constrained(ConstraintSpec("json_object", ""), "response_format")
    if kind == "json_schema":
        return await _json_schema(given.get("json_schema"), checker)
    if kind == "structural_tag":
        return await _structural_tag(
            {k: v for k, v in given.items() if k != "type"}, "response_format", checker
        )
    names = {"regex": ("regex", "pattern"), "choice": ("choice", "choices"), "grammar": ("grammar",)}[kind]
    value = next((given[name] for name in names if given.get(name) is not None), None)
    if value is None:
        field = f"response_format.{names[0]}"
        raise InvalidRequest(f"{field} is required with type {kind!r}", param=field, code="missing_field")
    return await _of_kind(kind, value, f"response_format.{names[0]}", checker)


async def _json_schema(given: Any, checker: GrammarChecker) -> Constrained:
    if not isinstance(given, dict) or "schema" not in given:
        field = "response_format.json_schema"
        raise InvalidRequest(
            f"{field} must be an object with name and schema", param=field, code="missing_field"
        )
    strict = given.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise InvalidRequest(
            "response_format.json_schema.strict must be true or false", param="response_format"
        )
    return await _schema(given["schema"], "response_format.json_schema.schema", bool(strict), checker)


def json_schema(schema: Any, param: str, *, strict: bool) -> Constrained:
    """A schema as a constraint. Under ``strict`` a keyword that is not enforced is refused, else warned of."""
    text, warnings = enforceable(schema, param, strict=strict)
    return Constrained(ConstraintSpec("json_schema", text), param, warnings)


async def _schema(schema: Any, param: str, strict: bool, checker: GrammarChecker) -> Constrained:
    """The same, off the event loop where the schema is large."""
    ((text, warnings),) = await checker.enforceable([(schema, param, strict)])
    return Constrained(ConstraintSpec("json_schema", text), param, warnings)


async def _structured(given: dict[str, Any], checker: GrammarChecker) -> Constrained:
    param = "structured_outputs"
    switched = [name for name in _SWITCHES if given.get(name)]
    if switched:
        raise InvalidRequest(f"{param}.{switched[0]} is not supported: there is one back end", param=param)
    wanted = [name for name in given if given[name] is not None and name not in _SWITCHES]
    unknown = [name for name in wanted if name not in _STRUCTURED]
    if unknown:
        raise InvalidRequest(
            f"unknown field {param}.{unknown[0]}{nearest(unknown[0], _STRUCTURED)}",
            param=param,
            code="unknown_field",
        )
    if len(wanted) != 1:
        raise InvalidRequest(f"{param} must hold exactly one of {', '.join(_STRUCTURED)}", param=param)
    return await _of_kind(wanted[0], given[wanted[0]], f"{param}.{wanted[0]}", checker)


async def _of_kind(kind: str, value: Any, param: str, checker: GrammarChecker) -> Constrained:
    """One value of vLLM's fields."""
    if kind == "json_object":
        return Constrained(ConstraintSpec("json_object", ""), param)
    if kind == "json":
        return await _schema(_maybe_json(value, param), param, False, checker)
    if kind == "structural_tag":
        return await _structural_tag(_maybe_json(value, param), param, checker)
    if kind == "choice":
        texts = isinstance(value, list) and value and all(isinstance(one, str) and one for one in value)
        if not texts:
            raise InvalidRequest(f"{param} must be a list of texts, none of them empty", param=param)
        return Constrained(ConstraintSpec("choice", json.dumps(value)), param)
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"{param} must be a text that is not empty", param=param)
    return Constrained(ConstraintSpec(kind, value), param)


def _maybe_json(value: Any, param: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return msgspec.json.decode(value)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(f"{param} is no valid JSON: {error}", param=param) from error


async def _structural_tag(given: Any, param: str, checker: GrammarChecker) -> Constrained:
    """``{"structures": [{"begin", "schema", "end"}], "triggers": [...]}``: text, and tags whose inside is enforced."""
    structures = given.get("structures") if isinstance(given, dict) else None
    if not isinstance(structures, list) or not structures or not all(isinstance(s, dict) for s in structures):
        raise InvalidRequest(
            f"{param} needs structures (begin, schema, end) and triggers, each list with an entry or more",
            param=param,
        )
    warnings: list[str] = []
    tags = []
    asked = [
        (one.get("schema", True), f"{param}.structures[{i}].schema", False)
        for i, one in enumerate(structures)
    ]
    for one, (schema, warned) in zip(structures, await checker.enforceable(asked)):
        warnings += warned
        tags.append({"begin": one.get("begin"), "schema": json.loads(schema), "end": one.get("end")})
    text = json.dumps({"structures": tags, "triggers": given.get("triggers")})
    return Constrained(ConstraintSpec("structural_tag", text), param, tuple(warnings))
