"""Write the generated parts of docs/api.md, docs/config.md and docs/migration.md from the schemas.

python scripts/generated_docs.py          rewrite them
python scripts/generated_docs.py --check  exit 1 when they lag
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from headrace.cli import serve  # noqa: E402
from headrace.config import env  # noqa: E402
from headrace.config.accelerators import ACCELERATORS  # noqa: E402
from headrace.config.foreign import TEI_FLAGS, TRT_TO_VLLM, VLLM_FLAGS, Foreign  # noqa: E402
from headrace.config.load import RULES  # noqa: E402
from headrace.config.schema.fields import Field, Section  # noqa: E402
from headrace.config.schema.own import OWN  # noqa: E402
from headrace.config.schema.top import TOP  # noqa: E402
from headrace.config.schema.types import REQUIRED  # noqa: E402
from headrace.config.support import GAPS  # noqa: E402
from headrace.serving.app import TABLE  # noqa: E402

FILES = ("docs/api.md", "docs/config.md", "docs/migration.md")
_MARK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(header)
    lines = [head, ["---"] * len(head), *[list(row) for row in rows]]
    return (
        "\n".join("| " + " | ".join(cell.replace("\n", " ") for cell in line) + " |" for line in lines) + "\n"
    )


def default(field: Field) -> str:
    if field.default is REQUIRED:
        return "required"
    if field.default in (None, {}, []):
        return ""
    return f"`{json.dumps(field.default)}`".replace('""', "")


def here(field: Field) -> str:
    """What becomes of a hosted key."""
    words = {"no_effect": "no effect", "differs": "differs", "not_yet": "not yet"}
    parts = [f"`{field.to}`"] if field.to else []
    if field.kind:
        parts.append(f"{words.get(field.kind, field.kind)}: {field.here}")
    return "; ".join(parts)


def section(item: Section) -> str:
    rows = [
        (
            " or ".join(f"`{name}`" for name in (field.name, *field.aliases)),
            field.type.describe(),
            default(field),
            field.doc,
            here(field),
        )
        for field in item.fields
    ]
    return f"### {item.title}\n\n{item.doc}\n\n" + table(("key", "type", "default", "meaning", "here"), rows)


def hosted() -> str:
    """Every section of the hosted schema once, in the order of the file."""
    seen: dict[str, str] = {}
    for item in TOP.walk():
        if item is not OWN:
            seen.setdefault(item.title, section(item))
    return "\n".join(seen.values())


def own() -> str:
    rows = [(f"`{field.name}`", field.type.describe(), default(field), field.doc) for field in OWN.fields]
    inner = [item for item in OWN.walk() if item is not OWN]
    text = table(("name", "type", "default", "meaning"), rows)
    for item in inner:
        rows = [
            (f"`{field.name}`", field.type.describe(), default(field), field.doc) for field in item.fields
        ]
        text += f"\n### {item.title}\n\n{item.doc}\n\n" + table(("name", "type", "default", "meaning"), rows)
    return text


def rules() -> str:
    return "".join(f"- {rule.doc}\n" for rule in RULES)


def serve_flags() -> set[str]:
    """Options of ``headrace serve``."""
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return {option for action in parser._actions for option in action.option_strings}


def flags(items: Iterable[Foreign]) -> str:
    known = serve_flags()
    missing = {gap.field: f"{'refused' if gap.blocks else 'no effect'}: {gap.why}" for gap in GAPS}

    def ours(item: Foreign) -> str:
        flag = {"model": "MODEL", "served_names": "--served-model-name"}.get(item.to)
        flag = flag or (item.to if item.to.startswith("--") else f"--{item.to.replace('_', '-')}")
        if flag not in known and flag != "MODEL":
            assert not item.to or item.to in missing, f"{item.name}: headrace serve has no {flag}"
            return missing.get(item.to, "")
        return f"`{flag}`"

    return table(("there", "here", "note"), ((f"`{item.name}`", ours(item), item.note) for item in items))


def renamed() -> str:
    rows = ((f"`{trt}`", f"`{vllm}`", f"`{vllm}`") for trt, vllm in TRT_TO_VLLM.items())
    return table(("TensorRT-LLM", "vLLM", "here"), rows)


def gaps() -> str:
    rows = ((f"`{gap.field}`", "refused" if gap.blocks else "ignored", gap.why) for gap in GAPS)
    return table(("setting", "", "what happens instead"), rows)


def variables() -> str:
    return table(("variable", "meaning"), ((f"`{name}`", text) for name, text in env.VARIABLES.items()))


def accelerators() -> str:
    def rate(gpu: Any, kind: str) -> str:
        return f"{gpu.flops[kind] / 1e12:,.0f}" if kind in gpu.flops else ""

    rows = [
        (gpu.name, f"{gpu.memory / 2**30:.1f}", f"{gpu.bandwidth / 1e9:,.0f}", f"{gpu.compute / 10}",
         rate(gpu, "float16"), rate(gpu, "bfloat16"), rate(gpu, "fp8"), rate(gpu, "fp4"))
        for gpu in ACCELERATORS.values() if gpu.known
    ]  # fmt: skip
    return table(("name", "GiB", "GB/s", "compute", "fp16 TFLOP/s", "bf16", "fp8", "fp4"), rows)


def request(schema: type[BaseModel]) -> str:
    """The fields of a request's body."""
    properties = schema.model_json_schema()["properties"]
    rows = []
    for name, row in properties.items():
        allowed = list(row.get("allowed", []))
        effect = row.get("effect", "acted on")
        if effect == "refused":
            same = list(
                dict.fromkeys(
                    f"{value:g}" if isinstance(value, float) else str(value).lower() for value in allowed
                )
            )
            effect = "refused unless null" + "".join(f" or `{value}`" for value in same if value)
        rows.append((f"`{name}`", json_type(row), effect, row.get("description", "")))
    return table(("Field", "Type", "Effect", "What it does"), rows)


def json_type(row: dict[str, Any]) -> str:
    if "$ref" in row:
        return "object"
    if "enum" in row:
        return " ".join(f"`{value}`" for value in row["enum"])
    if "anyOf" in row:
        parts = [json_type(one) for one in row["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(parts)) or "any"
    if row.get("type") == "array":
        return f"list of {json_type(row['items'])}"
    return str(row.get("type", "any"))


PARTS: dict[str, Callable[[], str]] = {
    "hosted": hosted,
    "own": own,
    "rules": rules,
    "vllm": lambda: flags(VLLM_FLAGS),
    "tei": lambda: flags(TEI_FLAGS),
    "renamed": renamed,
    "gaps": gaps,
    "variables": variables,
    "accelerators": accelerators,
    **{
        route.body.__name__: functools.partial(request, route.body)
        for route in TABLE
        if route.body is not None
    },
}


def rewritten(text: str) -> str:
    """A page with its generated parts made anew."""
    return _MARK.sub(lambda match: match[1] + PARTS[match[2]]() + match[3], text)


def main() -> int:
    """Rewrite or check."""
    lagging = []
    for name in FILES:
        file = ROOT / name
        text = file.read_text("utf-8")
        new = rewritten(text)
        if new != text:
            lagging.append(name)
            if "--check" not in sys.argv:
                file.write_text(new, "utf-8")
    if lagging:
        print(("lagging: " if "--check" in sys.argv else "rewrote ") + ", ".join(lagging))
    return 1 if lagging and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
