"""How long constraints take: compiling, the first mask, and every mask after it, over many real schemas.

    python -m benchmarks.constraints --schemas FILE.whl [--tokenizer FOLDER] [--limit 300] [--record]

FILE.whl is a wheel whose data holds JSON schemas of tools (bfcl-eval from PyPI: functions of the Berkeley Function
Calling Leaderboard), or a folder of JSON-Schema-Test-Suite. Each schema is compiled for the tokenizer's vocabulary,
its first mask is made, then a text of the grammar is written at random with a mask for each token. Times are single
threaded, in milliseconds; one JSON object a line. ``judge`` is reading the schema and compiling it in the child
process, ``compile`` the core's compilation; ``first_mask`` is all of it, from the schema's arrival. Masks are made by
llguidance with nothing between, so ``mask`` is its own time.
"""

from __future__ import annotations

import json
import random
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.common import Recorder, arguments
from headrace.checkpoints.resolve import resolve
from headrace.errors import HeadraceError
from headrace.execution.constraints.compiler import ConstraintCompiler
from headrace.execution.constraints.judge import Judge
from headrace.serving.constraints import json_schema
from headrace.text.tokenizer import Tokenizer

_TYPES = {
    "dict": "object",
    "float": "number",
    "tuple": "array",
    "list": "array",
    "any": None,
    "bool": "boolean",
}


def schemas(source: Path) -> Iterator[Any]:
    """Schemas of a wheel with BFCL's data, or of a folder of JSON-Schema-Test-Suite."""
    if source.is_dir():
        for file in sorted(source.rglob("*.json")):
            for group in json.loads(file.read_text(encoding="utf-8")):
                yield group["schema"]
        return
    with zipfile.ZipFile(source) as wheel:
        for name in sorted(wheel.namelist()):
            if "/data/BFCL" in name and name.endswith(".json") and "possible_answer" not in name:
                yield from _functions(wheel.read(name).decode("utf-8"))


def _functions(text: str) -> Iterator[Any]:
    for line in text.splitlines():
        try:
            functions = json.loads(line).get("function", [])
        except (ValueError, AttributeError):
            continue
        for function in functions if isinstance(functions, list) else [functions]:
            if isinstance(function, dict) and isinstance(function.get("parameters"), dict):
                yield _standard(function["parameters"])


def _standard(node: Any) -> Any:
    """BFCL names types as Python does."""
    if isinstance(node, list):
        return [_standard(one) for one in node]
    if not isinstance(node, dict):
        return node
    copy = {key: _standard(value) for key, value in node.items() if key not in ("default", "optional")}
    if isinstance(node.get("type"), str) and node["type"].lower() in _TYPES:
        kind = _TYPES[node["type"].lower()]
        copy.pop("type") if kind is None else copy.update(type=kind)
    return copy


def measure(source: Path, tokenizer: Tokenizer, limit: int) -> dict[str, list[float]]:
    """Milliseconds of each thing measured; ``refused`` counts schemas."""
    compiler = ConstraintCompiler(
        tokenizer.backend.to_str, vocab_size=tokenizer.vocab_size, eos_ids=tokenizer.eos_ids
    )
    judge = Judge()
    found: dict[str, list[float]] = {"judge": [], "compile": [], "first_mask": [], "mask": [], "refused": []}
    bits = np.zeros(-(-tokenizer.vocab_size // 32), np.int32)
    warm = json_schema(True, "warm", strict=False).spec
    compiler.submit(msgspec.structs.replace(warm, judged=judge.check(warm))).future.result()
    rng = random.Random(0)
    seen: set[str] = set()
    every = list(schemas(source))
    rng.shuffle(every)
    for schema in every:
        text = json.dumps(schema, sort_keys=True)
        if text in seen or len(seen) == limit:
            continue
        seen.add(text)
        try:
            began = time.perf_counter()
            spec = json_schema(schema, "schema", strict=False).spec
            spec = msgspec.structs.replace(spec, judged=judge.check(spec))
            judged = time.perf_counter()
            constraint = compiler.submit(spec).future.result()
        except HeadraceError:
            found["refused"].append(1.0)
            continue
        compiled = time.perf_counter()
        found["judge"].append((judged - began) * 1e3)
        found["compile"].append((compiled - judged) * 1e3)
        for step in range(40):
            began_mask = time.perf_counter()
            constraint.matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
            now = time.perf_counter()
            if step == 0:
                found["first_mask"].append((now - began) * 1e3)
            found["mask"].append((now - began_mask) * 1e3)
            allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))
            if not len(allowed) or not constraint.matcher.consume_token(int(rng.choice(allowed.tolist()))):
                break
            if constraint.matcher.is_stopped():
                break
    compiler.close()
    judge.close()
    return found


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("--schemas", type=Path, required=True)
    parser.add_argument("--tokenizer", default="smollm2-135m", help="a folder, GGUF file or packaged name")
    parser.add_argument("--limit", type=int, default=300)
    args = parser.parse_args()
    path = Path(args.tokenizer) if Path(args.tokenizer).exists() else resolve(args.tokenizer, None)
    found = measure(args.schemas, Tokenizer.from_path(path), args.limit)
    recorder = Recorder("constraints", args)
    case = f"{args.schemas.stem.split('-')[0]} x {len(found['compile'])}"

    def tell(metric: str, value: float) -> None:
        recorder.row(model=args.tokenizer, precision="", case=case, metric=metric, value=value)

    for name, percents in {
        "judge": (50, 99),
        "compile": (50, 99),
        "first_mask": (50, 99),
        "mask": (50, 99, 99.9),
    }.items():
        for percent in percents:
            tell(f"{name}_p{percent:g}_ms", float(np.percentile(found[name], percent)))
    tell("refused", float(len(found["refused"])))


if __name__ == "__main__":
    main()
