"""A config.yaml read, checked and explained, all in one pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headrace.config.report import Place, Report
from headrace.config.schema.rules import TRT_RULES
from headrace.config.schema.rules_rest import REST_RULES
from headrace.config.schema.top import TOP
from headrace.config.schema.types import INVALID, Reading
from headrace.config.schema.view import View, apply
from headrace.config.yaml import Node, load_text, read_file

__all__ = ["RULES", "check_file", "check_text"]

RULES = (*TRT_RULES, *REST_RULES)


def check_file(path: str | Path) -> View:
    """Read and check a file or a folder that holds config.yaml. Never raises for its content: see ``report``.

    Raises:
        ConfigError: the file cannot be read at all.
    """
    path = Path(path)
    report = Report()
    view = _check(read_file(path, report), report)
    folder = path if path.is_dir() else path.parent
    code = (
        folder
        / str(view.get("model_module_dir", "model"))
        / str(view.get("model_class_filename", "model.py"))
    )
    if code.is_file():
        report.notice(
            "differs", f"{code} is not run: requests go to the engine itself", place=Place(str(path))
        )
    return view


def check_text(text: str | bytes, file: str = "config.yaml") -> View:
    """Check YAML text."""
    report = Report()
    return _check(load_text(text, file, report), report)


def _check(node: Node | None, report: Report) -> View:
    if node is None:
        return View({}, {}, report)
    reading = Reading(report)
    values: Any = TOP.read(node, "", reading)
    view = View({} if values is INVALID else values, reading.places, report)
    apply(RULES, view)
    return view
