"""What is enforced of JSON Schema, keyword by keyword, measured on JSON-Schema-Test-Suite.

    python tools/schema_suite.py FOLDER [--docs docs/structured-output.md]

FOLDER holds ``draft7`` and ``draft2020-12`` (the suite's ``tests``; the sdist of PyPI's jsonschema ships them as
``json/tests``). Every schema of the suite is asked for strictly. A wrong accept is an instance that the suite calls
invalid and the grammar takes; a narrower answer is one that the suite calls valid and the grammar does not write.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.errors import InvalidRequest
from headrace.execution.constraints.judge_child import Compiler
from headrace.serving.constraints import json_schema

DRAFTS = ("draft2020-12", "draft7")
_MARKS = ("<!-- schema-suite -->\n", "<!-- end -->")


@dataclass
class Row:
    """Counts of one file of the suite: schemas enforced, refused; instances judged, accepted wrongly, narrower."""

    enforced: int = 0
    refused: int = 0
    instances: int = 0
    wrong: int = 0
    narrower: int = 0


def run(folder: Path) -> tuple[dict[str, dict[str, Row]], list[str]]:
    """Rows by draft and keyword, and a line for each wrong accept."""
    compiler = Compiler()
    rows: dict[str, dict[str, Row]] = {draft: defaultdict(Row) for draft in DRAFTS}
    wrong: list[str] = []
    for draft in DRAFTS:
        files = sorted(folder.joinpath(draft).glob("*.json"))
        formats = sorted(folder.joinpath(draft, "optional", "format").glob("*.json"))
        for file in (*files, *formats):
            name = f"format: {file.stem}" if file in formats else file.stem
            if name == "format":
                continue  # asks that formats be ignored
            for group in json.loads(file.read_text(encoding="utf-8")):
                _judge(compiler, group, rows[draft][name], wrong)
    return rows, wrong


def _judge(compiler: Compiler, group: dict[str, Any], row: Row, wrong: list[str]) -> None:
    try:
        wanted = json_schema(group["schema"], "schema", strict=True)
    except InvalidRequest:
        row.refused += 1
        return
    try:
        compiler.check(wanted.spec)
    except InvalidRequest:
        row.refused += 1
        return
    row.enforced += 1
    for test in group["tests"]:
        accepted = not compiler.match(wanted.spec, json.dumps(test["data"]))
        row.instances += 1
        if accepted and not test["valid"]:
            row.wrong += 1
            wrong.append(f"{json.dumps(group['schema'])[:200]} took {json.dumps(test['data'])[:80]}")
        row.narrower += test["valid"] and not accepted


def table(rows: dict[str, dict[str, Row]]) -> str:
    """Markdown: one line a keyword, both drafts."""
    lines = [
        "| File of the suite | 2020-12: enforced / refused | wrong accepts | narrower | draft 7: enforced / refused "
        "| wrong accepts | narrower |",
        "|---|---|---|---|---|---|---|",
    ]
    names = sorted(
        {name for one in rows.values() for name in one}, key=lambda n: (n.startswith("format:"), n)
    )
    for name in names:
        cells = []
        for draft in DRAFTS:
            row = rows[draft].get(name)
            cells += ["", "", ""] if row is None else _cells(row)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    totals = []
    for draft in DRAFTS:
        every = list(rows[draft].values())
        sums = [sum(getattr(row, field) for row in every) for field in Row.__dataclass_fields__]
        totals += _cells(Row(*sums))
    lines.append(f"| **all** | {' | '.join(totals)} |")
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> list[str]:
    judged = f" of {row.instances}" if row.instances else ""
    return [f"{row.enforced} / {row.refused}", f"{row.wrong}{judged}", str(row.narrower)]


def main() -> int:
    """Print the table, or put it between its marks in a Markdown file; 1 when anything was accepted wrongly."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--docs", type=Path)
    args = parser.parse_args()
    rows, wrong = run(args.folder)
    if args.docs is None:
        print(table(rows))
    else:
        before, _, rest = args.docs.read_text(encoding="utf-8").partition(_MARKS[0])
        after = rest.partition(_MARKS[1])[2]
        args.docs.write_text(before + _MARKS[0] + table(rows) + _MARKS[1] + after, encoding="utf-8")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
