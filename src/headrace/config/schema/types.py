"""Types of the schema's values, and the reader's state.

A type's ``read`` returns the checked value, or INVALID after reporting what is wrong; it never raises, so
that one pass finds everything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from headrace.config.report import Place, Report
from headrace.config.yaml import Node
from headrace.errors import nearest

if TYPE_CHECKING:
    from headrace.config.schema.fields import Section

__all__ = [
    "INVALID",
    "REQUIRED",
    "Anything",
    "Bool",
    "Enum",
    "Float",
    "Int",
    "ListOf",
    "MapOf",
    "Reading",
    "Str",
    "Type",
    "shown",
]


class _Marker:
    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


INVALID: Any = _Marker("INVALID")
REQUIRED: Any = _Marker("REQUIRED")


class Reading:
    """State of one pass: the report, and where every key that was given stands."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.places: dict[str, Place] = {}
        self.bad: set[str] = set()

    def wrong(self, message: str, path: str, place: Place) -> Any:
        """Report and return INVALID."""
        self.report.problem(message, path, place)
        self.bad.add(path)
        return INVALID


class Type:
    """Base of the value types."""

    def read(self, node: Node, path: str, reading: Reading) -> Any:
        raise NotImplementedError

    def describe(self) -> str:
        """For the documentation."""
        raise NotImplementedError

    def walk(self) -> Iterator[Section]:
        """Sections inside this type."""
        return iter(())


def shown(node: Node) -> str:
    """The value as the user wrote it, shortened; mappings and lists by kind only (they may hold secrets)."""
    if isinstance(node.value, (dict, list)):
        return node.kind()
    text = node.text[:60] + ("…" if len(node.text) > 60 else "")
    return repr(text) if isinstance(node.value, str) else text


def _yaml_trap(node: Node) -> str:
    """A hint where YAML's guess of the type surprises."""
    if node.implicit and isinstance(node.value, bool) and node.text.lower() not in ("true", "false"):
        return f" (YAML reads a bare {node.text} as {str(node.value).lower()}: quote it)"
    if node.implicit and isinstance(node.value, (int, float)) and ":" in node.text:
        return f" (YAML reads {node.text} as a number to base 60: quote it)"
    return ""


class Bool(Type):
    """true or false; as the hosted system, also the texts and numbers that can mean nothing else."""

    _WORDS = {"true": True, "yes": True, "on": True, "1": True, "t": True, "y": True} | dict.fromkeys(
        ("false", "no", "off", "0", "f", "n"), False
    )

    def read(self, node: Node, path: str, reading: Reading) -> Any:
        if isinstance(node.value, bool):
            return node.value
        word = node.text.lower() if isinstance(node.value, (str, int)) else ""
        if word in self._WORDS:
            return self._WORDS[word]
        return reading.wrong(f"is {shown(node)}; expected true or false", path, node.place)

    def describe(self) -> str:
        return "bool"


class Int(Type):
    """An integer in [low, high]. ``strict``: written as one, not as text or 8.0."""

    def __init__(
        self, low: int | None = None, high: int | None = None, *, strict: bool = True, multiple: int = 1
    ) -> None:
        self.low, self.high, self.strict, self.multiple = low, high, strict, multiple

    def read(self, node: Node, path: str, reading: Reading) -> Any:
        value = node.value
        if not self.strict and isinstance(value, str) and re.fullmatch(r"\s*[-+]?\d{1,18}\s*", value):
            value = int(value)
        if not self.strict and isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            trap = _yaml_trap(node)
            hint = "; write it without quotes" if isinstance(value, str) and value.strip().isdigit() else trap
            return reading.wrong(f"is {shown(node)}; expected {self._expected()}{hint}", path, node.place)
        low, high = self.low, self.high
        if (low is not None and value < low) or (high is not None and value > high):
            return reading.wrong(f"is {shown(node)}; expected {self._expected()}", path, node.place)
        if value % self.multiple:
            below, above = value // self.multiple * self.multiple, -(-value // self.multiple) * self.multiple
            near = below if low is None or below >= low else above
            return reading.wrong(
                f"is {value}; must be a multiple of {self.multiple}, such as {near}", path, node.place
            )
        return value

    def _expected(self) -> str:
        if self.low is not None and self.low == self.high:
            return f"{self.low}; no other value is supported"
        if self.low is not None and self.high is not None:
            return f"an integer from {self.low} to {self.high}"
        return "an integer" + (f" of at least {self.low}" if self.low is not None else "")

    def describe(self) -> str:
        if self.low is None:
            return "int"
        bounds = (
            f"{self.low}"
            if self.low == self.high
            else f"{self.low}..{'' if self.high is None else self.high}"
        )
        return f"int {bounds}" + (f", multiple of {self.multiple}" if self.multiple > 1 else "")


class Float(Type):
    """A finite number in [low, high], or above low with ``above``."""

    def __init__(self, low: float | None = None, high: float | None = None, *, above: bool = False) -> None:
        self.low, self.high, self.above = low, high, above

    def read(self, node: Node, path: str, reading: Reading) -> Any:
        value = node.value
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if good:
            try:
                value = float(value)
            except OverflowError:
                value = math.inf
        if not good or not math.isfinite(value) or self._outside(value):
            trap = _yaml_trap(node)
            return reading.wrong(f"is {shown(node)}; expected {self._expected()}{trap}", path, node.place)
        return value

    def _outside(self, value: float) -> bool:
        if self.low is not None and (value <= self.low if self.above else value < self.low):
            return True
        return self.high is not None and value > self.high

    def _expected(self) -> str:
        bounds = []
        if self.low is not None:
            bounds.append(f"{'above' if self.above else 'of at least'} {self.low:g}")
        if self.high is not None:
            bounds.append(f"at most {self.high:g}")
        return " ".join(["a number", " and ".join(bounds)]).strip()

    def describe(self) -> str:
        if self.low is None and self.high is None:
            return "number"
        high = "" if self.high is None else f"{self.high:g}]"
        return f"number {'(' if self.above else '['}{self.low:g}..{high}"


class Str(Type):
    """Text. ``parse`` checks it further: it returns the value or raises ValueError with a sentence.

    Args:
        numbers: a bare number is taken as its text (versions, names), with no complaint.
    """

    def __init__(
        self,
        what: str = "text",
        *,
        min_length: int = 0,
        parse: Callable[[str], Any] | None = None,
        numbers: bool = False,
    ) -> None:
        self.what, self.min_length, self.parse, self.numbers = what, min_length, parse, numbers

    def read(self, node: Node, path: str, reading: Reading) -> Any:
        value = node.value
        if self.numbers and isinstance(value, (int, float)) and not isinstance(value, bool):
            value = node.text
        if not isinstance(value, str):
            trap = _yaml_trap(node)
            hint = trap or ("; quote it" if isinstance(value, (int, float)) else "")
            return reading.wrong(f"is {shown(node)}; expected {self.what}{hint}", path, node.place)
        if len(value) < self.min_length:
            return reading.wrong(f"is empty; expected {self.what}", path, node.place)
        if self.parse is None:
            return value
        try:
            return self.parse(value)
        except ValueError as error:
            return reading.wrong(str(error), path, node.place)

    def describe(self) -> str:
        return self.what


class Enum(Type):
    """One of a few words.

    Args:
        old: words that once were legal -> why they are refused now and what to write.
        fold: compare in upper case.
    """

    def __init__(self, *values: str, old: dict[str, str] | None = None, fold: bool = False) -> None:
        self.values, self.old, self.fold = values, old or {}, fold

    def read(self, node: Node, path: str, reading: Reading) -> Any:
        value = node.value
        if isinstance(value, str):
            word = value.upper() if self.fold else value
            if word in self.values:
                return word
            if word in self.old:
                return reading.wrong(f"is {word!r}: {self.old[word]}", path, node.place)
        choices = ", ".join(self.values)
        near = nearest(node.text.lower(), [word.lower() for word in self.values], 1) if node.text else ""
        for word in self.values:
            near = near.replace(repr(word.lower()), repr(word))
        return reading.wrong(f"is {shown(node)}; expected one of {choices}{near}", path, node.place)

    def describe(self) -> str:
        return " \\| ".join(f"`{value}`" for value in self.values)


class ListOf(Type):
    """A list of one type."""

    def __init__(self, item: Type, *, min_length: int = 0) -> None:
        self.item, self.min_length = item, min_length

    def read(self, node: Node, path: str, reading: Reading) -> Any:
        if not isinstance(node.value, list):
            return reading.wrong(
                f"is {shown(node)}; expected a list (lines that begin with '- ')", path, node.place
            )
        if len(node.value) < self.min_length:
            return reading.wrong("is empty; expected at least one entry", path, node.place)
        values = []
        for index, child in enumerate(node.value):
            reading.places[f"{path}[{index}]"] = child.place
            values.append(self.item.read(child, f"{path}[{index}]", reading))
        return values

    def describe(self) -> str:
        return f"list of {self.item.describe()}"

    def walk(self) -> Iterator[Section]:
        return self.item.walk()


class MapOf(Type):
    """A mapping of free names to one type."""

    def __init__(self, item: Type, *, key: str = "", key_what: str = "") -> None:
        self.item, self.key, self.key_what = item, re.compile(key), key_what

    def read(self, node: Node, path: str, reading: Reading) -> Any:
        if not isinstance(node.value, dict):
            return reading.wrong(
                f"is {shown(node)}; expected a mapping (lines of 'name: value')", path, node.place
            )
        values = {}
        for name, child in node.value.items():
            inner = f"{path}.{name}"
            reading.places[inner] = node.key_places[name]
            if self.key_what and not self.key.search(name):
                reading.wrong(
                    f"the name {name[:60]!r} is refused: {self.key_what}", inner, node.key_places[name]
                )
                continue
            values[name] = self.item.read(child, inner, reading)
        return values

    def describe(self) -> str:
        return f"map of name to {self.item.describe()}"

    def walk(self) -> Iterator[Section]:
        return self.item.walk()


class Anything(Type):
    """Any value, kept as plain data."""

    def __init__(self, what: str = "anything", kinds: tuple[type, ...] = ()) -> None:
        self.what, self.kinds = what, kinds

    def read(self, node: Node, path: str, reading: Reading) -> Any:
        value = node.plain()
        if self.kinds and (
            not isinstance(value, self.kinds) or (isinstance(value, bool) and bool not in self.kinds)
        ):
            return reading.wrong(f"is {shown(node)}; expected {self.what}", path, node.place)
        _record(node, path, reading)
        return value

    def describe(self) -> str:
        return self.what


def _record(node: Node, path: str, reading: Reading) -> None:
    """Remember the places of keys inside a free-form value."""
    if isinstance(node.value, dict):
        for name, child in node.value.items():
            reading.places[f"{path}.{name}"] = node.key_places[name]
            _record(child, f"{path}.{name}", reading)
