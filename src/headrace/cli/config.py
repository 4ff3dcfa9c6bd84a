"""Check a config.yaml, or show what it resolves to."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from headrace.errors import ConfigError

if TYPE_CHECKING:
    from headrace.config.report import Place, Report
    from headrace.config.schema.view import View
    from headrace.config.spec import EngineSpec

EXAMPLES = """\
examples:
  headrace config check config.yaml            every problem with its line; for CI
  headrace config check a.yaml b.yaml --json   for programs
  headrace config check config.yaml --strict   fail on warnings and on what is not there yet, too
  headrace config show config.yaml             the one specification that it stands for, and who set what

exit codes: 0 nothing is wrong; 2 something is.
"""

WRONG = 2
_STRICT = ("warning", "not_yet")
_ENGINES = ("trt_llm", "bis_llm", "docker_server", "model_metadata.headrace.model")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="check|show")
    check = actions.add_parser("check", help="report every problem with its line")
    check.add_argument("files", nargs="+", metavar="FILE", help="config.yaml, or a folder that holds one")
    check.add_argument("--strict", action="store_true", help="fail on warnings, too")
    show = actions.add_parser("show", help="print what it resolves to")
    show.add_argument("files", nargs=1, metavar="FILE")
    for action in (check, show):
        action.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Check or show."""
    return _check(args) if args.action == "check" else _show(args)


def _check(args: argparse.Namespace) -> int:
    results = []
    good = True
    for file in args.files:
        report = _resolved(file)
        counted = report.problems or (
            args.strict and any(notice.kind in _STRICT for notice in report.notices)
        )
        good = good and not counted
        results.append({"file": file, **report.as_dict(), "ok": not counted})
        if not args.json:
            _print(file, report)
    if args.json:
        print(json.dumps(results, indent=1))
    return 0 if good else WRONG


def _read(file: str) -> View:
    """A file that cannot be opened is a problem of that file; the others are still checked."""
    from headrace.config.load import check_file
    from headrace.config.report import Place, Report
    from headrace.config.schema.view import View

    try:
        return check_file(file)
    except ConfigError as error:
        report = Report()
        report.problem(error.message.removeprefix(f"{file}: "), place=Place(file))
        return View({}, {}, report)


def _resolved(file: str) -> Report:
    """Problems and notices, those of the specification that it resolves to included."""
    from headrace.config.report import Place
    from headrace.config.resolve import resolve_view

    view = _read(file)
    if not view.report.ok and view.values and not any(view.given(block) for block in _ENGINES):
        view.report.problem(f"names no model: add one of {', '.join(_ENGINES)}", place=Place(file))
    if view.report.ok:
        try:
            spec = resolve_view(view).spec
        except ConfigError as error:
            for problem in error.problems:
                view.report.problem(problem.removeprefix(f"{file} "), place=Place(file))
        else:
            _warn_of_harm(spec, view.report, Place(file))
    return view.report


def _warn_of_harm(spec: EngineSpec, report: Report, place: Place) -> None:
    """What fewer bits cost this model, and whether it is served with them, if that is known."""
    from headrace.engines.plan import known_harms, known_refusals
    from headrace.errors import ModelError

    try:
        for sentence in known_harms(spec):
            report.notice("warning", sentence, path="quantization", place=place)
        for sentence in known_refusals(spec):
            report.notice("not_yet", sentence, path="quantization", place=place)
    except (ConfigError, ModelError) as error:  # the file is not at fault
        report.notice("warning", f"the model cannot be read: {error.message}", path="model", place=place)


def _print(file: str, report: Report) -> None:
    from headrace.config.report import KIND_TITLES

    for problem in report.problems:
        print(f"{problem}")
    for kind, title in KIND_TITLES.items():
        notices = report.of_kind(kind)
        if notices:
            print(f"{title}:")
        for notice in notices:
            print(f"  {notice}")
    print(f"{file}: {_verdict(report)}")


def _verdict(report: Report) -> str:
    count, missing = len(report.problems), len(report.of_kind("not_yet"))
    if count:
        return f"{count} problem" + "s" * (count > 1)
    if missing:
        return (
            f"well formed, but this version does not serve it: {missing} setting{'s' * (missing > 1)} above"
        )
    return "ok"


def _show(args: argparse.Namespace) -> int:
    from headrace.config.resolve import redacted, resolve_view

    view = _read(args.files[0])
    if not view.report.ok:
        for problem in view.report.problems:
            print(problem, file=sys.stderr)
        return WRONG
    found = resolve_view(view)
    shown = redacted(found.spec)
    if args.json:
        print(
            json.dumps({"spec": shown, "accelerator": found.accelerator, "origins": found.origins}, indent=1)
        )
        return 0
    width = max(len(name) for name in shown)
    for name, value in shown.items():
        origin = found.origins.get(name)
        print(
            f"{name:<{width}}  {json.dumps(value, ensure_ascii=False)}"
            + (f"    # {origin}" if origin else "")
        )
    return 0
