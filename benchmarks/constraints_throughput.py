"""What schemas cost a full batch: the same requests with schemas and as free text, one after the other.

    python -m benchmarks.constraints_throughput --model qwen3-0.6b [--requests 64] [--record]
    python -m benchmarks.constraints_throughput --model smollm2-135m --record

A shape of benchmarks/common.py gets random weights and a made-up vocabulary, else it is a packaged model or a folder.
Every request follows one of six schemas that cannot end before its tokens do. ``first_use`` is a run whose schemas
nobody has seen, compiling and learning included; then each round runs free text and the same schemas, and the ratio is
of the medians. Greedy (temperature 0) and drawn.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from typing import Any

import numpy as np
import torch

from benchmarks.common import SHAPES, Recorder, arguments, model_config
from benchmarks.made_up_bpe import made_up_bpe
from headrace.config.spec import EngineSpec
from headrace.engines.bench.cores import build_core
from headrace.engines.build import build
from headrace.engines.generate import GenerateCore
from headrace.execution.constraints.compiler import ConstraintCompiler
from headrace.execution.constraints.table import ConstraintTable
from headrace.execution.graphs import GraphRunner
from headrace.models.loading import random_weights
from headrace.models.registry import read_config
from headrace.scheduling.plan import StepPlan
from headrace.serving.constraints import json_schema
from headrace.types import ConstraintSpec, Request, SamplingParams


class _Timed(ConstraintTable):
    """Keeps the milliseconds that each step's grammars took: moving on, and until the masks were there."""

    advanced: list[float] = []  # noqa: RUF012
    filled: list[float] = []  # noqa: RUF012

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        fill = self._filler.fill

        def timed(*given: Any) -> None:
            began = time.perf_counter()
            fill(*given)
            self.filled.append((time.perf_counter() - began) * 1e3)

        self._filler.fill = timed  # type: ignore[method-assign]

    def advance(self, plan: StepPlan, tokens: list[int]) -> None:
        began = time.perf_counter()
        super().advance(plan, tokens)
        if self._live:
            self.advanced.append((time.perf_counter() - began) * 1e3)


def _records(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A list of objects too long to be finished."""
    one = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "array", "items": {**one, **more}, "minItems": 300}


_TEXT = {"type": "string", "minLength": 4, "maxLength": 60}
_NUMBER = {"type": "number", "minimum": -90, "maximum": 90}
SHAPES_OF_ANSWERS: list[dict[str, Any]] = [
    _records({"name": _TEXT, "kind": {"enum": ["town", "city", "village"]}, "people": {"type": "integer"}}),
    _records({"at": {"type": "array", "items": _NUMBER, "minItems": 2, "maxItems": 2}, "label": _TEXT}),
    _records({"id": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"}, "tags": {"type": "array", "items": _TEXT}}),
    _records({"when": {"type": "string", "format": "date-time"}, "by": {"type": "string", "format": "email"}}),
    _records({"value": {"anyOf": [_NUMBER, _TEXT, {"type": "null"}, {"type": "boolean"}]}, "note": _TEXT}),
    _records({"title": _TEXT, "parts": {"$ref": "#/$defs/tree"}}),
]  # fmt: skip
SHAPES_OF_ANSWERS[-1]["$defs"] = {
    "tree": {
        "type": "object",
        "properties": {"name": _TEXT, "below": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 3}},
        "required": ["name", "below"],
        "additionalProperties": False,
    }
}  # fmt: skip


def specs(salt: str) -> list[ConstraintSpec]:
    """The schemas as constraints that no cache knows."""
    salted = ({**schema, "$id": f"urn:{salt}"} for schema in SHAPES_OF_ANSWERS)
    return [json_schema(schema, "schema", strict=True).spec for schema in salted]


def random_core(name: str, case: tuple[int, int, int]) -> GenerateCore:
    """Random weights, and a vocabulary of the model's size."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = read_config(model_config(name))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    core = build_core(
        random_weights(config, dtype=dtype, device=device), [case], eager=device == "cpu", step_tokens=8192
    )
    vocabulary = made_up_bpe(config.vocab_size)
    compiler = ConstraintCompiler(
        lambda: vocabulary, vocab_size=config.vocab_size, eos_ids=(config.vocab_size - 1,)
    )
    _use(core, compiler)
    return core


def _use(core: GenerateCore, compiler: ConstraintCompiler | None) -> None:
    core.constraints = _Timed(compiler, core.runner.device)
    core.scheduler.is_ready = core.constraints.is_ready


def real_core(name: str, case: tuple[int, int, int]) -> GenerateCore:
    """A packaged model, or a folder."""
    count, inputs, outputs = case
    spec = EngineSpec(
        model=name, max_num_seqs=count, max_model_len=max(256, inputs + outputs), prefix_caching=False
    )
    core, _ = build(spec)
    assert isinstance(core, GenerateCore)
    _use(core, core.constraints.compiler)
    return core


def run(
    core: GenerateCore,
    case: tuple[int, int, int],
    follow: list[ConstraintSpec],
    seed: int,
    temperature: float,
) -> dict[str, float]:
    """Tokens a second, and the host's share."""
    count, inputs, outputs = case
    rng = random.Random(seed)
    vocab = core.runner.model.config.vocab_size - 256  # type: ignore[attr-defined]
    requests = [
        Request(
            id=f"{seed}-{i}",
            token_ids=tuple(rng.randrange(vocab) for _ in range(inputs)),
            sampling=SamplingParams(
                max_tokens=outputs,
                ignore_eos=True,
                temperature=temperature,
                seed=i,
                constraint=follow[i % len(follow)] if follow else None,
            ),
        )
        for i in range(count)
    ]
    gc.collect()
    began = time.perf_counter()
    core.add(requests)
    seen = 0
    while core.has_work():
        for output in core.step():
            if output.error:
                raise RuntimeError(output.error)
            seen += len(output.token_ids)
    seconds = time.perf_counter() - began
    if seen != count * outputs:
        raise RuntimeError(f"{seen} tokens came out, expected {count * outputs}")
    return {"tok_s": seen / seconds, "host_ms": core.stats().host_ms}


def _percentiles(values: list[float]) -> list[float]:
    return [round(float(np.percentile(values, p)), 3) for p in (50, 99)]


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="qwen3-0.6b")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--input", type=int, default=128)
    parser.add_argument("--output", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.8])
    args = parser.parse_args()
    case = (args.requests, args.input, args.output)
    core = (random_core if args.model in SHAPES else real_core)(args.model, case)
    if isinstance(core.runner, GraphRunner):
        core.runner.warm_up([args.requests])
    recorder = Recorder("constraints", args)
    for temperature in args.temperatures:
        for turn, follow in enumerate((specs(f"graphs-{temperature}"), [])):
            run(core, case, follow, 1000 + turn, temperature)
        known = specs(f"known-{temperature}")
        first = run(core, case, known, 2000, temperature)["tok_s"]
        free, bound = [], []
        _Timed.advanced.clear()
        _Timed.filled.clear()
        for turn in range(args.rounds):
            free.append(run(core, case, [], 2 * turn, temperature)["tok_s"])
            bound.append(run(core, case, known, 2 * turn + 1, temperature)["tok_s"])
        row: dict[str, Any] = {
            "model": args.model,
            "precision": str(next(core.runner.model.parameters()).dtype).removeprefix("torch."),  # type: ignore[attr-defined]
            "case": f"{args.requests}x{args.input}/{args.output} temperature {temperature:g}",
        }
        recorder.row(
            **row,
            metric="schemas_over_free_text",
            value=statistics.median(bound) / statistics.median(free),
            schemas_tok_s=[round(value) for value in bound],
            free_tok_s=[round(value) for value in free],
            host_ms=round(core.stats().host_ms, 3),
            advance_ms=_percentiles(_Timed.advanced),
            masks_ms=_percentiles(_Timed.filled),
        )
        recorder.row(**row, metric="first_use_over_free_text", value=first / statistics.median(free))
    core.close()


if __name__ == "__main__":
    main()
