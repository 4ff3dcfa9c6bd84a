"""YAML read as data with places: line numbers for every key, bounded work, nothing ever constructed or run.

Scalars mean what they mean to PyYAML (YAML 1.1; the hosted system reads its files so), except that dates
stay text. Refused, each with its place: duplicate keys, more than one document, tags other than the plain
ones, recursive anchors, and files over the limits below.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from headrace.config.report import Place, Report
from headrace.errors import ConfigError

__all__ = ["MAX_BYTES", "MAX_DEPTH", "MAX_NODES", "Node", "load_text", "read_file", "scalar"]

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PURE = _Loader is yaml.SafeLoader

MAX_BYTES = 48 * 1024 if _PURE else 512 * 1024  # the pure parser reads some 100 kB a second
MAX_DEPTH = 40
MAX_NODES = 20_000  # counted after aliases are followed
_MAX_NUMBER_CHARS = 300
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_PREFIX = "tag:yaml.org,2002:"
_SCALAR_TAGS = frozenset(
    _PREFIX + name for name in ("str", "int", "float", "bool", "null", "timestamp", "value")
)
_RESOLVER = yaml.SafeLoader.yaml_implicit_resolvers


class Node:
    """A value and where it stands.

    Attributes:
        value: a scalar; ``list[Node]``; or ``dict[str, Node]``.
        key_places: for mappings, the place of each key.
        text: a scalar as written.
        implicit: a plain scalar whose type YAML guessed.
        size: nodes below and including this one, aliases followed.
    """

    __slots__ = ("implicit", "key_places", "place", "size", "text", "value")

    def __init__(self, value: Any, place: Place, text: str = "", implicit: bool = False) -> None:
        self.value = value
        self.place = place
        self.text = text
        self.implicit = implicit
        self.key_places: dict[str, Place] = {}
        self.size = 1

    def plain(self) -> Any:
        """The value as Python data without places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def kind(self) -> str:
        """What the user wrote, in YAML's words."""
        value = self.value
        names = {bool: "true/false", int: "an integer", float: "a number", str: "text", dict: "a mapping"}
        return "nothing (null)" if value is None else names.get(type(value), "a list")


class _Stop(Exception):
    """Reading cannot go on; the problem is in the report."""


def read_file(path: Path, report: Report) -> Node | None:
    """Parse a file. None when it cannot be read; then the report says why.

    Raises:
        ConfigError: there is no such file.
    """
    name = str(path)
    try:
        if path.is_dir():
            path = path / "config.yaml"
            name = str(path)
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        twin = path.with_suffix(".yml" if path.suffix == ".yaml" else ".yaml")
        hint = f"; there is {twin.name} beside it" if twin.exists() else ""
        raise ConfigError(f"{name}: no such file{hint}") from None
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror or error}") from None
    return load_text(data, name, report)


def load_text(data: bytes | str, file: str, report: Report) -> Node | None:
    """Parse YAML text. None when nothing usable came out; then the report says why.

    An empty document is an empty mapping.
    """
    try:
        return _Reader(_decode(data, file, report), file, report).document()
    except _Stop:
        return None
    except yaml.YAMLError as error:
        place, message = _explain(error, file)
        report.problem(message, place=place)
        return None


def _decode(data: bytes | str, file: str, report: Report) -> str:
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    if len(raw) > MAX_BYTES:
        report.problem(
            f"the file is over {MAX_BYTES // 1024} KiB; a configuration never needs that much. "
            "Long example inputs belong into a file of their own",
            place=Place(file),
        )
        raise _Stop
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        report.problem(
            f"byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8", place=Place(file, line)
        )
        raise _Stop from None
    control = _CONTROL.search(text)
    if control:
        line = text.count("\n", 0, control.start()) + 1
        name = "a NUL character" if control[0] == "\0" else f"the control character U+{ord(control[0]):04X}"
        report.problem(f"not valid YAML: the file holds {name}; remove it", place=Place(file, line))
        raise _Stop
    return text


def _explain(error: yaml.YAMLError, file: str) -> tuple[Place, str]:
    """A parser's complaint as one sentence with the way out."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    place = Place(file, mark.line + 1, mark.column + 1) if mark else Place(file)
    problem = str(getattr(error, "problem", "") or getattr(error, "reason", "") or error).strip()
    context = str(getattr(error, "context", "") or "").strip()
    if "cannot start any token" in problem and (
        "\\t" in problem or "tab" in problem or "character" in problem
    ):
        problem += "; indent with spaces, never tabs, and quote text that begins with a sign such as @ % `"
    elif "mapping values are not allowed" in problem:
        problem += "; check the indentation, or quote a text that holds ': '"
    return place, f"not valid YAML: {context + ': ' if context else ''}{problem}"


class _Reader:
    """Events to nodes, with every bound checked while reading, so that nothing grows first."""

    def __init__(self, text: str, file: str, report: Report) -> None:
        self.file = file
        self.report = report
        self.events: Iterator[Any] = yaml.parse(text, Loader=_Loader)
        self.anchors: dict[str, Node | None] = {}
        self.total = 0

    def place(self, event: Any) -> Place:
        return Place(self.file, event.start_mark.line + 1, event.start_mark.column + 1)

    def stop(self, message: str, event: Any) -> _Stop:
        self.report.problem(message, place=self.place(event))
        return _Stop()

    def document(self) -> Node:
        root: Node | None = None
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                if root is not None:
                    raise self.stop("a second document begins here; one file holds one configuration", event)
                root = self.node(next(self.events), 0)
        if root is None or (root.value is None and root.text == ""):
            root = Node({}, Place(self.file, 1, 1))
        return root

    def node(self, event: Any, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise self.stop(f"nested deeper than {MAX_DEPTH} levels", event)
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event)
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            node = self.scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self.sequence(event, depth)
        else:
            node = self.mapping(event, depth)
        self.count(1, event)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def count(self, size: int, event: Any) -> None:
        self.total += size
        if self.total > MAX_NODES:
            raise self.stop(f"more than {MAX_NODES} values once aliases are followed", event)

    def alias(self, event: Any) -> Node:
        if event.anchor not in self.anchors:
            raise self.stop(f"*{event.anchor} refers to an anchor that is not defined above", event)
        node = self.anchors[event.anchor]
        if node is None:
            raise self.stop(f"*{event.anchor} stands inside its own anchor", event)
        self.count(node.size, event)
        return node

    def sequence(self, event: Any, depth: int) -> Node:
        self.check_tag(event, _PREFIX + "seq", "list")
        node = Node([], self.place(event))
        for item in self.events:
            if isinstance(item, yaml.SequenceEndEvent):
                break
            child = self.node(item, depth + 1)
            node.value.append(child)
            node.size += child.size
        return node

    def mapping(self, event: Any, depth: int) -> Node:
        self.check_tag(event, _PREFIX + "map", "mapping")
        node = Node({}, self.place(event))
        merged: list[Node] = []
        for item in self.events:
            if isinstance(item, yaml.MappingEndEvent):
                break
            key = self.node(item, depth + 1)
            value = self.node(next(self.events), depth + 1)
            node.size += value.size + 1
            if item.__class__ is yaml.ScalarEvent and item.value == "<<" and item.implicit[0]:
                merged += self.merge_sources(value, item)
            else:
                self.put(node, key, value, item)
        for source in merged:
            for name, child in source.value.items():
                if name not in node.value:
                    node.value[name] = child
                    node.key_places[name] = source.key_places[name]
        return node

    def merge_sources(self, value: Node, event: Any) -> list[Node]:
        sources = value.value if isinstance(value.value, list) else [value]
        if not all(isinstance(source.value, dict) for source in sources):
            raise self.stop("<< merges a mapping or a list of mappings", event)
        return list(sources)

    def put(self, node: Node, key: Node, value: Node, event: Any) -> None:
        if isinstance(key.value, (dict, list)):
            raise self.stop("a key must be a single word, not a list or mapping", event)
        name = key.text
        if name in node.value:
            first = node.key_places[name].line
            self.report.problem(
                f"the key {name[:80]!r} is given twice (first on line {first}); keep one of them",
                place=key.place,
            )
            return
        node.value[name] = value
        node.key_places[name] = key.place

    def check_tag(self, event: Any, expected: str, what: str) -> None:
        if event.tag not in (None, "!", expected):
            raise self.stop(f"the tag {_short_tag(event.tag)} is refused: a {what} is plain data here", event)

    def scalar(self, event: Any) -> Node:
        place = self.place(event)
        text: str = event.value
        plain = event.implicit[0]
        if event.tag not in (None, "!") and event.tag not in _SCALAR_TAGS:
            raise self.stop(f"the tag {_short_tag(event.tag)} is refused: values are plain data here", event)
        tag = event.tag if event.tag not in (None, "!") else _guess_tag(text) if plain else _PREFIX + "str"
        try:
            return Node(_construct(text, tag), place, text, plain)
        except (ValueError, OverflowError):
            raise self.stop(
                f"{text[:40]!r} is not a number that can be read; quote it if it is text", event
            ) from None


def _short_tag(tag: str) -> str:
    return ("!!" + tag.removeprefix(_PREFIX) if tag.startswith(_PREFIX) else tag)[:80]


def _guess_tag(text: str) -> str:
    for tag, pattern in _RESOLVER.get(text[:1], []) + _RESOLVER.get(None, []):
        if pattern.match(text):
            return str(tag)
    return _PREFIX + "str"


def _construct(text: str, tag: str) -> Any:
    kind = tag.removeprefix(_PREFIX)
    if kind == "null":
        return None
    if kind == "bool":
        value = yaml.SafeLoader.bool_values.get(text.lower())
        if value is None:
            raise ValueError(text)
        return value
    if kind == "int":
        return _integer(text)
    if kind == "float":
        return _number(text)
    return text


def _integer(text: str) -> int:
    """YAML 1.1 integers: signs, underscores, 0b, 0x, octal with a leading 0, and base 60 with colons."""
    if len(text) > _MAX_NUMBER_CHARS:
        raise ValueError(text)
    digits = text.replace("_", "")
    sign = -1 if digits.startswith("-") else 1
    digits = digits.lstrip("+-")
    if ":" in digits:
        return sign * int(_base60(digits))
    if digits != "0" and digits.startswith("0") and digits[1:2].isdigit():
        return sign * int(digits, 8)
    return sign * int(digits, 0)


def _number(text: str) -> float:
    if len(text) > _MAX_NUMBER_CHARS:
        raise ValueError(text)
    digits = text.replace("_", "").lower()
    sign = -1.0 if digits.startswith("-") else 1.0
    digits = digits.lstrip("+-")
    if digits in (".inf", ".nan"):
        return sign * float(digits[1:])
    return sign * (_base60(digits) if ":" in digits else float(digits))


def _base60(digits: str) -> float:
    value = 0.0
    for part in digits.split(":"):
        value = value * 60 + float(part)
    return value


def scalar(text: str) -> Any:
    """What a bare word means, for flags: ``8192`` an integer, ``0.9`` a number, ``yes`` true; else text."""
    try:
        return _construct(text, _guess_tag(text))
    except (ValueError, OverflowError):
        return text
