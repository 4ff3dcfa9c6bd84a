"""How a cross-field rule looks at a checked configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from headrace.config.report import Kind, Place, Report
from headrace.config.schema.types import INVALID

__all__ = ["Rule", "View", "apply", "rule"]


class View:
    """Values by dotted path. Reading an invalid one is an error of the rule: name it in ``needs``.

    Attributes:
        values: the nested result of reading the schema.
        places: where each key that was given stands.
    """

    def __init__(self, values: dict[str, Any], places: dict[str, Place], report: Report) -> None:
        self.values, self.places, self.report = values, places, report

    def get(self, path: str, default: Any = None) -> Any:
        """The value, default filled in; ``default`` when a block on the way is absent."""
        value: Any = self.values
        for name in path.split("."):
            if not isinstance(value, dict) or name not in value:
                return default
            value = value[name]
        return default if value is None or value is INVALID else value

    def given(self, path: str) -> bool:
        """Whether the user wrote this key."""
        return path in self.places

    def invalid(self, path: str) -> bool:
        """Whether it was written and refused."""
        value: Any = self.values
        for name in path.split("."):
            if not isinstance(value, dict):
                return value is INVALID
            value = value.get(name)
        return value is INVALID

    def place(self, path: str) -> Place:
        """Where the key stands, or the nearest block around it."""
        while path:
            if path in self.places:
                return self.places[path]
            cut = max(path.rfind("."), path.rfind("["))
            path = path[: max(cut, 0)]
        return Place()

    def error(self, path: str, message: str) -> None:
        self.report.problem(message, path, self.place(path))

    def notice(self, kind: Kind, path: str, message: str) -> None:
        self.report.notice(kind, message, path, self.place(path))


class Rule(msgspec.Struct, frozen=True):
    """A check over several fields.

    Attributes:
        needs: paths whose values must be valid for it to make sense.
        when: a block that must be there.
    """

    name: str
    doc: str
    check: Callable[[View], None]
    needs: tuple[str, ...] = ()
    when: str = ""


def rule(
    rules: list[Rule], *needs: str, when: str = ""
) -> Callable[[Callable[[View], None]], Callable[[View], None]]:
    """Register a function; its docstring is the rule's sentence in the documentation."""

    def register(check: Callable[[View], None]) -> Callable[[View], None]:
        rules.append(Rule(check.__name__, " ".join((check.__doc__ or "").split()), check, needs, when))
        return check

    return register


def apply(rules: Iterable[Rule], view: View) -> None:
    """Run every rule whose inputs are there and valid."""
    for item in rules:
        if item.when and view.get(item.when) is None:
            continue
        if not any(view.invalid(path) for path in item.needs):
            item.check(view)
