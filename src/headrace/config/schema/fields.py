"""The words in which the schema is written: fields, sections of them, and choices between sections."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec

from headrace.config.report import Kind, Place
from headrace.config.schema.types import INVALID, REQUIRED, Enum, Reading, Type, shown
from headrace.config.yaml import Node
from headrace.errors import nearest

__all__ = ["Choice", "F", "Field", "Section"]


class Field(msgspec.Struct, frozen=True, kw_only=True):
    """One key.

    Attributes:
        default: value when absent; REQUIRED; ``{}`` for a section that is always there.
        doc: what the key means.
        to: the EngineSpec field it becomes.
        here: what a user of the hosted system must know about it here.
        kind: the notice given with ``here`` when the key is set to something else than its default.
        null: an explicit null counts as absent.
    """

    name: str
    type: Type
    default: Any
    doc: str
    to: str = ""
    here: str = ""
    kind: Kind | None = None
    null: bool = False
    aliases: tuple[str, ...] = ()


def F(
    name: str,
    type: Type,
    default: Any,
    doc: str,
    *,
    to: str = "",
    no_effect: str = "",
    differs: str = "",
    not_yet: str = "",
    aliases: tuple[str, ...] = (),
) -> Field:
    """A field in one line; at most one of ``no_effect``, ``differs``, ``not_yet``."""
    kinds: list[tuple[Kind, str]] = [("no_effect", no_effect), ("differs", differs), ("not_yet", not_yet)]
    kind, here = next(((kind, here) for kind, here in kinds if here), (None, ""))
    return Field(
        name=name, type=type, default=default, doc=doc, to=to, here=here, kind=kind, null=default is None,
        aliases=aliases,
    )  # fmt: skip


class Section(Type):
    """A mapping with known keys.

    Args:
        title: for the documentation.
        elsewhere: keys that people put here by mistake -> where they belong.
    """

    def __init__(self, title: str, doc: str, *fields: Field, elsewhere: dict[str, str] | None = None) -> None:
        self.title, self.doc, self.fields = title, doc, fields
        self.elsewhere = elsewhere or {}
        self.by_name = {name: field for field in fields for name in (field.name, *field.aliases)}

    def read(self, node: Node, path: str, reading: Reading) -> Any:
        if not isinstance(node.value, dict):
            return reading.wrong(
                f"is {shown(node)}; expected a mapping (lines of 'key: value')", path, node.place
            )
        values: dict[str, Any] = {}
        for name, child in node.value.items():
            self._read_key(name, child, node.key_places[name], path, values, reading)
        for field in self.fields:
            if field.name not in values:
                values[field.name] = self._absent(field, path, node.place, reading)
        return values

    def _read_key(
        self, name: str, child: Node, place: Place, path: str, values: dict[str, Any], reading: Reading
    ) -> None:
        field = self.by_name.get(name)
        inner = _join(path, field.name if field else name)
        if field is None:
            hint = self.elsewhere.get(name) or f"unknown key{nearest(name, self.by_name)}"
            reading.wrong(hint, inner, place)
            return
        if field.name in values:
            reading.wrong(f"is given twice, also as {name!r}; keep one of them", inner, place)
            return
        reading.places[inner] = place
        if child.value is None and field.null:
            values[field.name] = field.default
            return
        value = values[field.name] = field.type.read(child, inner, reading)
        if field.kind and value is not INVALID and value != field.default:
            reading.report.notice(field.kind, field.here, inner, place)

    def _absent(self, field: Field, path: str, place: Place, reading: Reading) -> Any:
        inner = _join(path, field.name)
        if field.default is REQUIRED:
            where = f"in {path}" if path else "at the top level"
            return reading.wrong(f"is required {where}: {field.doc}", inner, place)
        if isinstance(field.type, (Section, Choice)) and field.default == {}:
            return field.type.read(Node({}, place), inner, reading)
        return list(field.default) if isinstance(field.default, list) else field.default

    def describe(self) -> str:
        return f"[{self.title}](#{re.sub(r'[^a-z0-9_ -]', '', self.title.lower()).replace(' ', '-')})"

    def walk(self) -> Iterator[Section]:
        yield self
        for field in self.fields:
            yield from field.type.walk()


class Choice(Type):
    """Sections told apart by one key.

    Args:
        key: its name.
        cases: its values -> what the rest must look like (each section declares the key itself).
        default: the case when the key is absent.
    """

    def __init__(self, key: str, cases: dict[str, Section], default: str) -> None:
        self.key, self.cases, self.default = key, cases, default

    def read(self, node: Node, path: str, reading: Reading) -> Any:
        case = self.default
        if isinstance(node.value, dict) and self.key in node.value:
            chosen = node.value[self.key]
            picked = Enum(*self.cases).read(chosen, _join(path, self.key), reading)
            if picked is INVALID:
                return INVALID
            case = picked
        return self.cases[case].read(node, path, reading)

    def describe(self) -> str:
        return " or ".join(section.describe() for section in self.cases.values())

    def walk(self) -> Iterator[Section]:
        for section in self.cases.values():
            yield from section.walk()


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
