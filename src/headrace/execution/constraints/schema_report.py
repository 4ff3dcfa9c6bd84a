"""Which keywords of a JSON schema the grammar compiler enforces, and the schema that it gets.

The sets below are what JSON-Schema-Test-Suite shows (drafts 7 and 2020-12; tools/schema_suite.py,
docs/structured-output.md): of a keyword in ENFORCED no instance of the suite was accepted wrongly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec

from headrace.errors import InvalidRequest

__all__ = ["ANNOTATIONS", "ENFORCED", "FORMATS", "UNENFORCED", "Report", "enforceable", "read_schema"]

ENFORCED = frozenset(
    [
        "type",
        "enum",
        "const",
        "properties",
        "required",
        "additionalProperties",
        "patternProperties",
        "items",
        "prefixItems",
        "additionalItems",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
        "minLength",
        "maxLength",
        "pattern",
        "minItems",
        "maxItems",
        "minProperties",
        "maxProperties",
        "anyOf",
        "allOf",
        "$ref",
        "$defs",
        "definitions",
        "$anchor",
        "$id",
        "$schema",
        "id",
    ]
)
ANNOTATIONS = frozenset(
    [
        "title",
        "description",
        "default",
        "examples",
        "example",
        "$comment",
        "deprecated",
        "readOnly",
        "writeOnly",
        "contentEncoding",
        "contentMediaType",
        "contentSchema",
        "discriminator",
        "externalDocs",
        "xml",
        "nullable",
        "$vocabulary",
    ]
)
UNENFORCED = frozenset(
    [
        "not",
        "if",
        "then",
        "else",
        "contains",
        "minContains",
        "maxContains",
        "uniqueItems",
        "propertyNames",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "unevaluatedItems",
        "unevaluatedProperties",
        "$dynamicRef",
        "$dynamicAnchor",
        "$recursiveRef",
        "$recursiveAnchor",
    ]
)
FORMATS = frozenset(["duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"])

# Days of the Gregorian calendar and times of day, as patterns: the compiler's own formats let 29 February pass in
# any year. Leap seconds are left out.
_DATE = (
    "(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    "|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]+)?(?:[Zz]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_PATTERNS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}[Tt]{_TIME}$"}

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLE = (
    "items",
    "additionalProperties",
    "additionalItems",
    "not",
    "contains",
    "propertyNames",
    "if",
    "then",
    "else",
)
_SHAPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(_MAPS, (dict,)),
    **dict.fromkeys((*_LISTS, "required", "enum"), (list,)),
    **dict.fromkeys(("format", "$ref", "pattern", "$id", "$anchor", "$schema"), (str,)),
    "type": (str, list),
}
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_EXACT = 2**53  # the compiler reads bounds as floats
_MAX_NODES = 50_000
_MAX_DEPTH = 100
_NAMED_AT_MOST = 8


class Report(msgspec.Struct, frozen=True):
    """What was found.

    Attributes:
        schema: what the compiler gets: formats of dates as patterns, exclusive ``oneOf`` as ``anyOf``.
        unenforced: (JSON pointer, keyword, why) of everything the grammar does not hold the output to.
        named: whether it says anything of properties by name.
    """

    schema: Any
    unenforced: tuple[tuple[str, str, str], ...]
    named: bool = False

    @property
    def sentence(self) -> str:
        """The unenforced keywords in words; empty when there are none."""
        named = [f"{keyword} at {pointer or '/'} ({why})" for pointer, keyword, why in self.unenforced]
        more = len(named) - _NAMED_AT_MOST
        return "; ".join(named[:_NAMED_AT_MOST]) + (f"; and {more} more" if more > 0 else "")

    def text(self) -> str:
        """The schema as JSON, with the compiler's switches: to go on without what it cannot enforce, and no ``\\u``
        in texts, by which a name could be written so that it is taken for another."""
        if not isinstance(self.schema, dict):
            return json.dumps(self.schema)
        switches: dict[str, Any] = {"lenient": True, "coerce_one_of": True} if self.unenforced else {}
        text = json.dumps(self.schema, ensure_ascii=False)
        if self.named and not _has_controls(text):
            switches["json_allowed_escapes"] = 'nrbtf\\"'
        return json.dumps({**self.schema, "x-guidance": switches}) if switches else json.dumps(self.schema)


def _has_controls(text: str) -> bool:
    """Whether a text of the schema can only be written with ``\\u``."""
    return "\\u00" in text


def enforceable(schema: Any, param: str, *, strict: bool) -> tuple[str, tuple[str, ...]]:
    """What the compiler gets, as JSON, and warnings of what is not enforced.

    Raises InvalidRequest (``param``) for what is no schema, and under ``strict`` for keywords that are not enforced.
    """
    report = read_schema(schema, param)
    if report.unenforced and strict:
        raise InvalidRequest(
            f"{param} cannot be enforced strictly: {report.sentence}; leave it out or set strict to false",
            param=param,
            code="unenforced_keyword",
        )
    warnings = (f"{param}: not enforced: {report.sentence}",) if report.unenforced else ()
    return report.text(), warnings


def read_schema(schema: Any, param: str) -> Report:
    """Look through a schema.

    Args:
        param: the request field that holds it, for errors.

    Raises InvalidRequest when it is no schema, nested over 100 levels, or larger than 50,000 subschemas.
    """
    if not isinstance(schema, (dict, bool)):
        raise InvalidRequest(f"{param} must be a JSON schema: an object or a boolean", param=param)
    reader = _Reader(schema, param)
    read = reader.schema(schema, "", 0)
    if reader.named and _has_controls(json.dumps(read, ensure_ascii=False)):
        reader.unenforced.append(("", "properties", "beside texts with control characters: names in escapes"))
    return Report(read, tuple(reader.unenforced), reader.named)


class _Reader:
    def __init__(self, root: Any, param: str) -> None:
        self._root = root
        self._param = param
        self._nodes = 0
        self.named = False
        self.unenforced: list[tuple[str, str, str]] = []

    def _refuse(self, message: str) -> InvalidRequest:
        return InvalidRequest(f"the schema {message}", param=self._param)

    def schema(self, node: Any, pointer: str, depth: int) -> Any:
        """A rewritten copy; notes what is not enforced."""
        self._nodes += 1
        if self._nodes > _MAX_NODES:
            raise self._refuse(f"has over {_MAX_NODES} subschemas")
        if depth > _MAX_DEPTH:
            raise self._refuse(f"is nested over {_MAX_DEPTH} levels")
        if isinstance(node, bool):
            return node
        if not isinstance(node, dict):
            raise self._refuse(
                f"has {json.dumps(node)[:60]} at {pointer or '/'}; expected an object or a boolean"
            )
        copy: dict[str, Any] = {}
        for key, value in node.items():
            at = f"{pointer}/{key.replace('~', '~0').replace('/', '~1')}"
            if self._keyword(key, value, node, pointer):
                copy[key] = self._value(key, value, at, depth)
        self._formats(node, copy, pointer)
        self._one_of(copy, pointer)
        self._names(node, pointer)
        return copy

    def _names(self, node: dict[str, Any], pointer: str) -> None:
        """Properties by name; and ``minProperties``, which a key that comes twice would meet."""
        is_open = node.get("additionalProperties") is not False or bool(node.get("patternProperties"))
        self.named |= is_open and bool(node.get("properties") or node.get("patternProperties"))
        required, least = node.get("required"), node.get("minProperties")
        if not is_open or not isinstance(least, (int, float)):
            return
        if least > max(1, len(set(map(str, required))) if isinstance(required, list) else 0):
            self.unenforced.append((pointer, "minProperties", "a further property may come twice"))

    def _keyword(self, key: str, value: Any, node: dict[str, Any], pointer: str) -> bool:
        """Note a keyword; False drops it from the copy."""
        if key == "x-guidance":
            raise self._refuse(
                f"sets x-guidance at {pointer or '/'}, which is the compiler's own switch; leave it out"
            )
        if key in ANNOTATIONS or key.startswith("x-"):
            return False
        if not isinstance(value, _SHAPES.get(key, (object,))):
            raise self._refuse(
                f"has {key}: {json.dumps(value)[:60]} at {pointer or '/'}, which is of the wrong type"
            )
        if key in UNENFORCED:
            self.unenforced.append((pointer, key, "not enforced"))
        elif key not in ENFORCED and key not in ("oneOf", "format"):
            self.unenforced.append((pointer, key, "unknown keyword"))
        elif key in _BOUNDS and isinstance(value, (int, float)) and abs(value) > _EXACT:
            self.unenforced.append((pointer, key, "beyond 2^53 bounds are not exact"))
        elif key == "$id" and "$ref" in node:
            self.unenforced.append((pointer, "$id", "beside $ref it depends on the draft"))
        return True

    def _value(self, key: str, value: Any, at: str, depth: int) -> Any:
        if key in _MAPS and isinstance(value, dict):
            return {name: self.schema(sub, f"{at}/{_escape(name)}", depth + 1) for name, sub in value.items()}
        if (key in _LISTS or key == "items") and isinstance(value, list):
            return [self.schema(sub, f"{at}/{i}", depth + 1) for i, sub in enumerate(value)]
        if key in _SINGLE and isinstance(value, (dict, bool)):
            return self.schema(value, at, depth + 1)
        return value

    def _formats(self, node: dict[str, Any], copy: dict[str, Any], pointer: str) -> None:
        found = node.get("format")
        if found is None or found in FORMATS:
            return
        pattern = _PATTERNS.get(found)
        if pattern is None:
            self.unenforced.append((pointer, "format", f"unknown format {found[:40]!r}"))
            del copy["format"]
            return
        del copy["format"]
        if "pattern" in copy:
            copy["allOf"] = [*copy.get("allOf", ()), {"pattern": pattern}]
        else:
            copy["pattern"] = pattern

    def _one_of(self, copy: dict[str, Any], pointer: str) -> None:
        """``oneOf`` is ``anyOf`` where no two branches can hold together."""
        branches = copy.get("oneOf")
        if not isinstance(branches, list):
            return
        if len(branches) > 1 and not self._exclusive(branches):
            self.unenforced.append((pointer, "oneOf", "branches may overlap: treated as anyOf"))
        del copy["oneOf"]
        if "anyOf" in copy:
            copy["allOf"] = [*copy.get("allOf", ()), {"anyOf": branches}]
        else:
            copy["anyOf"] = branches

    def _exclusive(self, branches: list[Any]) -> bool:
        resolved = [self._resolve(branch) for branch in branches]
        if not all(isinstance(branch, dict) for branch in resolved):
            return False
        return any(_disjoint(list(sets)) for sets in _tellers(resolved))

    def _resolve(self, branch: Any) -> Any:
        """Follow ``#/...`` references, at most eight in a row."""
        for _ in range(8):
            if not isinstance(branch, dict) or not isinstance(branch.get("$ref"), str):
                break
            here = self._root
            for step in branch["$ref"].removeprefix("#").split("/")[1:]:
                key = step.replace("~1", "/").replace("~0", "~")
                here = here.get(key) if isinstance(here, dict) else None
            branch = here
        return branch


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _tellers(branches: list[dict[str, Any]]) -> Iterator[list[set[str] | None]]:
    """For each way to tell branches apart, what each allows: their types, their values, a required property's."""
    yield [_types(branch) for branch in branches]
    yield [_values(branch) for branch in branches]
    for name in branches[0].get("properties", {}) if isinstance(branches[0].get("properties"), dict) else ():
        yield [_property_values(branch, name) for branch in branches]


def _disjoint(sets: list[set[str] | None]) -> bool:
    if any(one is None for one in sets):
        return False
    known = [one for one in sets if one is not None]
    return len(set().union(*known)) == sum(len(one) for one in known)


def _types(branch: dict[str, Any]) -> set[str] | None:
    """Types a branch allows, or None if any; an integer is a number."""
    given = branch.get("type")
    named = [given] if isinstance(given, str) else given
    if not isinstance(named, list) or not all(isinstance(one, str) for one in named):
        return None
    return {"number" if one == "integer" else one for one in named}


def _values(branch: dict[str, Any]) -> set[str] | None:
    values = [branch["const"]] if "const" in branch else branch.get("enum")
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        return None
    return set(values)


def _property_values(branch: dict[str, Any], name: str) -> set[str] | None:
    """Texts that a required property may hold, in a branch that takes only objects."""
    properties, required = branch.get("properties"), branch.get("required")
    if branch.get("type") != "object" or not isinstance(properties, dict) or not isinstance(required, list):
        return None
    found = properties.get(name)
    return _values(found) if name in required and isinstance(found, dict) else None
