"""Tile shapes of few rows, chosen by the time of a whole decode step of some layers.

    python -m benchmarks.tune_step --models qwen3-8b --rows 16 64

Shapes that are fast alone may leave no room for their neighbours, which begin before they end: so each linear map in
turn tries its candidates while the others keep theirs, twice. Writes src/headrace/kernels/linear/tuned/<gpu>.json.
`--compile-only` fills Triton's cache for a later run.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import arguments, device_name, model_config
from benchmarks.kernels import Case, _some, cases_of, compile_all, graph_seconds
from headrace.engines.bench.cases import Case as Load
from headrace.engines.bench.cores import build_core, random_model
from headrace.execution.graph_keys import GraphKey
from headrace.execution.graphs import GraphRunner
from headrace.kernels.linear import triton_stream, tuning
from headrace.kernels.linear.tuning import RingShape

KEYS = {1: 256, 8: 256, 16: 256, 32: 400, 64: 576}  # of each sequence, by rows
LAYERS = {"qwen3-0.6b": 14, "qwen3-8b": 12}
Chosen = dict[str, RingShape]


def candidates(rows: int, case: Case) -> list[RingShape]:
    """Rings whose programs fit twice or thrice on a multiprocessor; K is split where columns alone are too few."""
    bm, halves, found = max(rows, 8), 2 if case.gate else 1, []
    forms = [(fold, 64 // fold, False) for fold in (1, 2, 4) if bm * fold <= 128]
    forms += [(1, 128, False)] if case.head or (bm == 64 and case.n >= 16384) else []
    forms += [(64 // bm, bn, True) for bn in (8, 16, 32, 64) if 16 <= bn * 64 // bm <= 64] if bm >= 16 else []
    for (fold, bn, x_first), bk, splits in itertools.product(forms, (64, 128, 256), (1, 2, 3)):
        width, tiles_n = case.k // fold, -(-case.n // (bn * halves))
        tiles, rest = divmod(width, splits * bk)
        stage = (halves * bn + bm) * fold * bk * 2
        unfit = rest or not tiles or not 60 <= tiles_n * splits <= 1600 or (splits > 1 and tiles_n > 70)
        if unfit or (case.head and (splits > 1 or fold > 1 or x_first)) or (bk == 256 and case.k > 1024):
            continue
        for budget in (76, 112):
            stages = min(tiles, (budget << 10) // stage)
            shape = RingShape(bm, bn, bk, fold, splits, stages, x_first)
            if stages >= min(2, tiles) and shape not in found:
                found.append(shape)
    return found


class StepTimer:
    """A decode step of ``rows`` sequences, its shapes chosen by ``chosen`` (by n x k)."""

    def __init__(self, name: str, rows: int) -> None:
        self.rows, self.chosen = rows, Chosen()
        config = {**model_config(name), "num_hidden_layers": LAYERS[name]}
        model = random_model(config, dtype=torch.bfloat16, device=torch.device("cuda"))
        core = build_core(model, [Load(rows, KEYS[rows], 16)], eager=False, step_tokens=8192)
        assert isinstance(core.runner, GraphRunner)
        self.runner = core.runner
        for cache in self.runner.caches:
            cache.k.normal_()
            cache.v.normal_()
        tables = self.runner._device_tables
        width = -(-(KEYS[rows] + 16) // self.runner.block_size)
        blocks = torch.arange(rows * width, dtype=torch.int32, device=tables.device) + 1
        tables[:rows, :width] = blocks.view(rows, width)
        at = torch.arange(rows, dtype=torch.int32)
        packed = [at, torch.full_like(at, KEYS[rows]), at + 5, torch.full_like(at, -1)]
        self.packed = torch.stack(packed).cuda()
        self.given = self.packed.clone().flatten()
        rule = triton_stream._shape

        def shape(x: Any, weight: Any, gated: bool) -> Any:
            found = self.chosen.get(f"{weight.shape[0]}x{weight.shape[1]}")
            return found if found is not None else rule(x, weight, gated)

        triton_stream._shape = shape
        self._undo: Callable[[], None] = lambda: setattr(triton_stream, "_shape", rule)

    def seconds(self, replays: int = 5) -> float:
        key = GraphKey(self.rows, self.rows, "tokens")
        given = self.given.view(4, self.rows)

        def step(_: int) -> None:
            given.copy_(self.packed)
            self.runner.functions.compute(self.given, key)

        with torch.inference_mode():
            return graph_seconds(step, 1, replays)

    def close(self) -> None:
        self._undo()


def is_right(case: Case, shape: RingShape, rows: int) -> bool:
    """Whether a map in this shape agrees with the Triton kernel's."""
    x = torch.randn(rows, case.k, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(case.n, case.k, dtype=torch.bfloat16, device="cuda") * case.k**-0.5
    found, rule = [], triton_stream._shape
    try:
        for one in (shape, tuning.stream_shape(x.device, rows, case.n, case.k, case.gate)):
            triton_stream._shape = lambda *_, one=one: one
            out = triton_stream.stream_linear(x, weight, gate="silu" if case.gate else None)
            found.append(out.float())
    finally:
        triton_stream._shape = rule
    return bool((found[0] - found[1]).norm() < 5e-3 * found[1].norm())


def descend(timer: StepTimer, lists: dict[str, list[Any]]) -> None:
    """Choose for one map after another; in the second round only among what was near the best."""
    for name, shapes in lists.items():  # None: what the table says
        results = _results(timer, name, shapes)
        timer.chosen[name] = results[0][1]
        lists[name] = [shape for _, shape in results[:4]]
        print(f"  {name:14s} " + " ".join(f"{_show(s)}={t * 1e6:.0f}" for t, s in results[:9]), flush=True)
    for name, shapes in lists.items():
        results = _results(timer, name, shapes)
        timer.chosen[name] = results[0][1]
    timer.chosen = {name: shape for name, shape in timer.chosen.items() if shape is not None}


def _results(timer: StepTimer, name: str, shapes: list[Any]) -> list[tuple[float, Any]]:
    results = []
    for shape in shapes:
        timer.chosen[name] = shape
        try:
            results.append((timer.seconds(), shape))
        except Exception as error:
            print("failed:", name, shape, type(error).__name__, str(error)[:100], flush=True)
            torch.cuda.synchronize()
    return sorted(results, key=lambda result: result[0])


def _show(shape: Any) -> str:
    return "now" if shape is None else "/".join(str(int(number)) for number in shape[1:])


def compile_only(name: str, rows: int, limit: int, maps: list[str] | None) -> None:
    """Each map alone, without launching it, so that its weights need not be there twice."""
    jobs: list[Callable[[], None]] = []
    chosen = threading.local()
    triton_stream._shape = lambda *_: chosen.shape
    for case in cases_of(name):
        if maps and f"{case.n}x{case.k}" not in maps:
            continue
        run = case.make(max(rows, 2), copies=1)
        for shape in _some(candidates(rows, case), limit):

            def job(run: Any = run, shape: Any = shape) -> None:
                chosen.shape = shape
                run(0)

            jobs.append(job)
    compile_all(jobs)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=["qwen3-0.6b", "qwen3-8b"])
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 64, 32, 8, 1])
    parser.add_argument("--tuned", help="file to write, instead of the one in the package")
    parser.add_argument("--limit", type=int, default=100, help="candidates of one map at most")
    parser.add_argument("--maps", nargs="+", help="n x k of these alone, as 4096x12288")
    parser.add_argument("--compile-only", action="store_true")
    args = parser.parse_args()
    name = device_name().lower().replace(" ", "-")
    path = Path(args.tuned or Path(tuning.__file__).parent / "tuned" / f"{name}.json")
    table: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for model, rows in itertools.product(args.models, args.rows):
        if args.compile_only:
            compile_only(model, rows, args.limit, args.maps)
            continue
        timer = StepTimer(model, rows)
        before = timer.seconds(9)
        cases = {f"{case.n}x{case.k}": case for case in cases_of(model)}
        maps = args.maps or list(cases)
        lists = {key: _some(candidates(rows, cases[key]), args.limit) for key in maps}
        descend(timer, {key: [None, *shapes] for key, shapes in lists.items()})
        after = timer.seconds(9)
        print(f"{model} {rows} rows: {before * 1e6:.0f} us, {after * 1e6:.0f} us", flush=True)
        for key, shape in timer.chosen.items() if after < before else ():
            if not is_right(cases[key], shape, rows):
                raise SystemExit(f"{key} in {shape} is wrong")
            table[f"r{rows}:{key}{'g' if cases[key].gate else ''}"] = list(shape)
        lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(table.items()))
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        timer.close()
        del timer
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
