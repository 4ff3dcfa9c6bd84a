"""Arguments that formats write in their own syntax, as JSON."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Mapping
from typing import Any

from headrace.serving.parsers.reader import Unfit

__all__ = ["gemma_arguments", "kinds_of", "python_arguments", "typed"]

_NAMES = {"true": True, "false": False, "null": None, "None": None, "True": True, "False": False}
_MAX_DEPTH = 50


def dump(value: Any) -> str:
    """JSON as models write it: with spaces, and letters as they are; halves of letters joined or replaced."""
    text = json.dumps(value, ensure_ascii=False)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def typed(text: str, schema: Any) -> str:
    """JSON of a value that stands as bare text, by the type its schema gives; a text unless it says otherwise."""
    kinds = kinds_of(schema)
    if kinds and "string" not in kinds:
        return dump(_loads(text))
    if kinds == {"string"}:
        return dump(text)
    value = _loads(text) if not kinds or text.strip() == "null" else text
    return dump(value)


def kinds_of(schema: Any) -> set[str]:
    """Types that a schema names; empty: it does not say."""
    if not isinstance(schema, Mapping):
        return set()
    given = schema.get("type")
    if isinstance(given, str):
        return {given}
    if isinstance(given, list):
        return {one for one in given if isinstance(one, str)}
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        return {"string"} if all(isinstance(one, str) for one in values) else {"number"}
    branches = [*(schema.get("anyOf") or ()), *(schema.get("oneOf") or ())]
    return set().union(*map(kinds_of, branches)) if branches else set()


def _loads(text: str) -> Any:
    """JSON, or Python's True, False and None; else the text itself."""
    stripped = text.strip()
    if stripped in _NAMES:
        return _NAMES[stripped]
    try:
        return json.loads(stripped, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return text


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def python_arguments(text: str) -> str:
    """JSON object of ``key=literal, ...``; raises Unfit for anything but keywords and literals."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes that Python does not know stay as they are
            call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise Unfit
        return dump({_key(one): _literal(one.value, 0) for one in call.keywords})
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Unfit from error


def _key(keyword: ast.keyword) -> str:
    if keyword.arg is None:
        raise Unfit
    return keyword.arg


def _literal(node: ast.expr, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise Unfit
    match node:
        case ast.Constant(value=str() | int() | float() | bool() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.Name(id=name) if name in _NAMES:
            return _NAMES[name]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_literal(item, depth + 1) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {
                _text_key(key): _literal(value, depth + 1)
                for key, value in zip(keys, values, strict=True)
                if key is not None
            }
    raise Unfit


def _text_key(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise Unfit


def gemma_arguments(text: str, quote: str) -> str:
    """JSON object of ``{key:value,...}`` with texts between ``quote``; raises Unfit."""
    reader = _Gemma(text, quote)
    value = reader.value(0)
    reader.space()
    if reader.at != len(text) or not isinstance(value, dict):
        raise Unfit
    return dump(value)


class _Gemma:
    """Reads one value after another from a text that is all there."""

    def __init__(self, text: str, quote: str) -> None:
        self.text = text
        self.quote = quote
        self.at = 0

    def space(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def eat(self, text: str) -> bool:
        self.space()
        if self.text.startswith(text, self.at):
            self.at += len(text)
            return True
        return False

    def value(self, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise Unfit
        if self.eat(self.quote):
            return self.up_to(self.quote)
        if self.eat("{"):
            return self.object(depth)
        if self.eat("["):
            return self.array(depth)
        self.space()
        if self.text.startswith('"', self.at):
            return self.quoted()
        start = self.at
        while self.at < len(self.text) and self.text[self.at] not in ",]}":
            self.at += 1
        word = self.text[start : self.at].strip()
        if not word:
            raise Unfit
        return _loads(word)

    def up_to(self, end: str) -> str:
        place = self.text.find(end, self.at)
        if place < 0:
            raise Unfit
        found = self.text[self.at : place]
        self.at = place + len(end)
        return found

    def quoted(self) -> str:
        try:
            found, self.at = json.JSONDecoder(strict=False).raw_decode(self.text, self.at)
        except ValueError as error:
            raise Unfit from error
        return str(found)

    def object(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not self.eat("}"):
            if found and not self.eat(","):
                raise Unfit
            self.space()
            if self.eat(self.quote):
                key = self.up_to(self.quote)
            elif self.text.startswith('"', self.at):
                key = self.quoted()
            else:
                place = self.text.find(":", self.at)
                if place < 0:
                    raise Unfit
                key, self.at = self.text[self.at : place].strip(), place
            if not self.eat(":"):
                raise Unfit
            found[key] = self.value(depth + 1)
        return found

    def array(self, depth: int) -> list[Any]:
        found: list[Any] = []
        while not self.eat("]"):
            if found and not self.eat(","):
                raise Unfit
            found.append(self.value(depth + 1))
        return found
