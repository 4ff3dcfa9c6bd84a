"""What was found while reading a configuration: problems that stop it, and notices that do not."""

from __future__ import annotations

from typing import Literal

import msgspec

from headrace.errors import ConfigError

__all__ = ["NOWHERE", "Kind", "Notice", "Place", "Problem", "Report"]

Kind = Literal["lifted", "no_effect", "differs", "warning", "not_yet"]

KIND_TITLES: dict[Kind, str] = {
    "warning": "warning",
    "lifted": "lifted: refused by the hosted system, allowed here",
    "differs": "works differently here",
    "no_effect": "accepted, no effect here",
    "not_yet": "not in this version: the server refuses to start with it",
}


class Place(msgspec.Struct, frozen=True, order=True):
    """Where something was written: file, and line and column counted from 1 (0: unknown)."""

    file: str = ""
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        if not self.line:
            return self.file
        return f"{self.file}:{self.line}" if self.file else f"line {self.line}"


NOWHERE = Place()


class Problem(msgspec.Struct, frozen=True):
    """One thing that is wrong.

    Attributes:
        place: where it stands.
        path: the key's path, such as ``trt_llm.build.max_seq_len``.
        message: what is wrong, what was expected, and the way out.
    """

    place: Place
    path: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (str(self.place), self.path, self.message) if part)


class Notice(msgspec.Struct, frozen=True):
    """Something the user should know that does not stop anything."""

    kind: Kind
    place: Place
    path: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (str(self.place), self.path, self.message) if part)


class Report:
    """Collects problems and notices in the order of the file."""

    def __init__(self) -> None:
        self._problems: list[Problem] = []
        self._notices: list[Notice] = []

    @property
    def problems(self) -> list[Problem]:
        return sorted(self._problems, key=lambda problem: problem.place)

    @property
    def notices(self) -> list[Notice]:
        return sorted(self._notices, key=lambda notice: notice.place)

    @property
    def ok(self) -> bool:
        return not self._problems

    def problem(self, message: str, path: str = "", place: Place = NOWHERE) -> None:
        """Record an error; the same one at the same place counts once."""
        found = Problem(place, path, message)
        if found not in self._problems:
            self._problems.append(found)

    def notice(self, kind: Kind, message: str, path: str = "", place: Place = NOWHERE) -> None:
        """Record something that does not stop."""
        found = Notice(kind, place, path, message)
        if found not in self._notices:
            self._notices.append(found)

    def of_kind(self, kind: Kind) -> list[Notice]:
        return [notice for notice in self.notices if notice.kind == kind]

    def raise_problems(self) -> None:
        """Raises: ConfigError with every problem, when there is one."""
        if self._problems:
            problems = self.problems
            raise ConfigError([str(problem) for problem in problems], param=problems[0].path or None)

    def require_supported(self) -> None:
        """Refuse what this version cannot do yet, rather than serve without it. Raises: ConfigError."""
        missing = self.of_kind("not_yet")
        if missing:
            raise ConfigError([str(notice) for notice in missing], param=missing[0].path)

    def as_dict(self) -> dict[str, object]:
        """For ``--json``: plain lists of problems and notices."""

        def entry(item: Problem | Notice) -> dict[str, object]:
            place = item.place
            return {"file": place.file, "line": place.line, "path": item.path, "message": item.message}

        return {
            "ok": self.ok,
            "problems": [entry(problem) for problem in self.problems],
            "notices": [{"kind": notice.kind, **entry(notice)} for notice in self.notices],
        }
