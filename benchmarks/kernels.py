"""Linear maps of few rows against the device's ceilings and against cuBLAS. Attention: benchmarks/attention.py.

    python -m benchmarks.kernels --record
    python -m benchmarks.kernels --tune     # writes src/headrace/kernels/linear/tuned/<gpu>.json

Every figure is the median of replays of one CUDA graph that walks over enough different weights not to fit the L2
cache.
"""

from __future__ import annotations

import itertools
import json
import statistics
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from benchmarks.common import Recorder, arguments, ceilings, device_name, model_config
from headrace.kernels.linear import triton as linear
from headrace.kernels.linear import triton_stream, tuning
from headrace.kernels.linear.triton_stream import Stream
from headrace.kernels.linear.tuning import GemvShape, RingShape, StreamShape
from headrace.kernels.tuned import tuned

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
AHEAD_BYTES = 20 << 20  # of weights that a map may ask for before its turn, well within the L2 cache
# x_first, bn, bk, splits, stages
STREAMS = [
    *((True, 16, bk, splits, 4) for bk in (128, 256) for splits in (1, 2)),
    *((True, 32, bk, splits, stages) for bk, stages in ((64, 6), (128, 4), (256, 3)) for splits in (1, 2)),
    *((True, 64, bk, splits, stages) for bk, stages in ((128, 3), (128, 4), (64, 6)) for splits in (1, 2)),
    *((True, 128, 64, splits, 4) for splits in (1, 2)),
    *(
        (False, 64, bk, splits, stages)
        for bk, stages in ((128, 3), (128, 4), (64, 4))
        for splits in (1, 2, 4)
    ),
    *((False, 128, 64, splits, stages) for splits in (1, 2) for stages in (3, 4)),
]
SPREAD = 256 << 20  # bytes that one graph walks over


def graph_seconds(run: Callable[[int], object], count: int, replays: int = 15) -> float:
    """Seconds of run(i), i = 0 .. count - 1 in one graph, by call."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(min(count, 2)):
            run(i)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        for i in range(count):
            run(i)
        graph.capture_end()
        times = []
        for _ in range(replays + 2):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / count)
    return statistics.median(times[2:])


# --- linear maps -------------------------------------------------------------------------------------


class Case:
    """One linear map of a decode step: [norm] x @ w.T [gate] [residual] or argmax."""

    def __init__(
        self, n: int, k: int, *, norm: bool, gate: bool = False, residual: bool = False, head: bool = False
    ):
        self.n, self.k, self.norm, self.gate, self.residual, self.head = n, k, norm, gate, residual, head
        self.bytes = 2 * n * k

    def make(self, rows: int, copies: int = 0) -> Callable[[int], object]:
        """The map of weights number i, of so many (0: of more than L2 holds)."""
        copies = copies or self.copies
        weights = torch.randn(copies, self.n, self.k, dtype=DTYPE, device=DEVICE) * 0.02
        x = torch.randn(rows, self.k, dtype=DTYPE, device=DEVICE)
        if rows > 1:
            return self.make_stream(rows, x, weights)
        options: dict[str, Any] = {}
        if self.norm:
            options["norm"] = (torch.ones(self.k, dtype=DTYPE, device=DEVICE), 1e-6)
        if self.head:
            return lambda i: linear.argmax_linear(x, weights[i], **options)
        if self.gate:
            options["gate"] = "silu"
        if self.residual:
            options["residual"] = torch.randn(rows, self.n, dtype=DTYPE, device=DEVICE)
        self.torch_run = lambda i: F.linear(x, weights[i])
        return lambda i: linear.small_linear(x, weights[i], **options)

    def make_stream(self, rows: int, x: Tensor, weights: Tensor) -> Callable[[int], object]:
        """The same for more rows, where the map before the norm has taken it already."""
        self.torch_run = lambda i: F.linear(x, weights[i])
        sums = torch.ones(-(-self.k // 64), rows, dtype=torch.float32, device=DEVICE)
        stream = Stream(x, x, sums)
        if self.head:
            return lambda i: triton_stream.stream_argmax(stream, weights[i], eps=1e-6)
        if self.residual:
            to = Stream(*(torch.randn(rows, self.n, dtype=DTYPE, device=DEVICE) for _ in range(2)), sums)
            gain = torch.ones(self.n, dtype=DTYPE, device=DEVICE)
            return lambda i: triton_stream.add_linear(x, weights[i], to, gain)
        gate = "silu" if self.gate else None
        return lambda i: triton_stream.stream_linear(stream, weights[i], eps=1e-6, gate=gate)

    @property
    def copies(self) -> int:
        return max(2, min(32, SPREAD // self.bytes))


def cases_of(name: str) -> list[Case]:
    c = model_config(name)
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    heads, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    return [
        Case(heads + 2 * kv, hidden, norm=True),
        Case(hidden, heads, norm=False, residual=True),
        Case(2 * inner, hidden, norm=True, gate=True),
        Case(hidden, inner, norm=False, residual=True),
        Case(c["vocab_size"], hidden, norm=True, head=True),
    ]


def candidates(rows: int, case: Case) -> list[GemvShape | StreamShape]:
    """Shapes worth trying."""
    found: list[GemvShape | StreamShape] = []
    if rows == 1:
        for bn, bk, warps in itertools.product((1, 2, 4, 8, 16), (512, 1024, 2048), (4, 8)):
            per_thread = bn * bk // (32 * warps) * (2 if case.gate else 1)
            if 16 <= per_thread <= 64 and bk <= case.k and not (case.head and bn < 4):
                found.append(GemvShape(bn, bk, warps, 1))
        return found
    double, bm = 2 if case.gate else 1, min(rows, 128)
    for x_first, bn, bk, splits, stages in STREAMS:
        shared = stages * (bn * double + bm) * bk * 2
        programs = -(-case.n // (bn * double)) * splits
        busy = 60 <= programs <= 800 or (case.head and splits == 1 and bn >= 64)
        if 24_000 <= shared <= 113_000 and case.k // (splits * bk) >= 2 and busy:
            ahead = max(1, min(16, AHEAD_BYTES // (programs * bn * double * bk * 2)))
            warps = 8 if bn * bm * double > 64 * 128 else 4
            found.append(StreamShape(bm, bn, bk, splits, warps, stages, x_first, ahead))
    return found


def ring_candidates(rows: int, case: Case) -> list[RingShape]:
    """Rings of up to a third, a half and nearly all of a multiprocessor's memory."""
    found = []
    halves, weights = 2 if case.gate else 1, case.bytes
    for fold, height, bk, splits in itertools.product(
        (1, 2, 4, 8), (64, 128), (64, 128, 256), (1, 2, 3, 4, 6, 8)
    ):
        bn, width = height // fold, case.k // fold
        tiles, rest = divmod(width, splits * bk)
        programs = -(-case.n // (bn * halves)) * splits
        fits = rows * fold <= 128 and not rest and tiles and 60 <= programs <= 1300
        sums = 0 if splits == 1 else splits * case.n * rows * 8
        moved = programs * rows * (case.k // splits) * 2
        if not fits or sums > max(8 << 20, weights // 8) or moved > max(17 << 20, weights):
            continue
        if case.head and (splits > 1 or fold > 1):
            continue
        if (height == 128 and fold > 2) or (bk == 256 and tiles > 4):
            continue
        stage = (halves * bn + rows) * fold * bk * 2
        deep = {min(tiles, limit // stage) for limit in (74 << 10, 112 << 10)}
        if tiles * stage <= 220 << 10:
            deep.add(tiles)
        found += [
            RingShape(rows, bn, bk, fold, splits, stages)
            for stages in deep
            if stages > 1 or 0 < stages == tiles
        ]
    return found


def _some(found: list[Any], limit: int) -> list[Any]:
    """At most ``limit`` of them, evenly spread."""
    return found if len(found) <= limit else [found[i * len(found) // limit] for i in range(limit)]


def _rule(rows: int, case: Case) -> GemvShape | StreamShape:
    """What an unknown GPU would take."""
    unknown = torch.device("cpu")
    if rows == 1:
        return tuning.gemv_shape(unknown, case.n, case.k, case.gate)
    return tuning.stream_shape(unknown, rows, case.n, case.k, case.gate)


_compiling = threading.local()
_original_run = triton.runtime.jit.JITFunction.run


def _run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
    return _original_run(self, *args, grid=grid, warmup=warmup or getattr(_compiling, "on", False), **kwargs)


def compile_all(jobs: list[Callable[[], object]]) -> None:
    """Compile what the jobs would launch, in threads, without launching it."""
    triton.runtime.jit.JITFunction.run = _run

    def work(job: Callable[[], object]) -> None:
        _compiling.on = True
        try:
            job()
        except Exception as error:  # a shape that does not compile is no candidate
            print("does not compile:", type(error).__name__, str(error)[:100], flush=True)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, jobs))


def _note(table: dict[str, list[Any]], key: str, shape: Any, faster: bool) -> None:
    """The best shape of its kind; a ring is taken wherever it is there, so only where it is the faster one."""
    kind = {RingShape: "r", StreamShape: "s"}.get(type(shape), "")
    if faster:
        table[kind + key] = list(shape)
    if faster and kind == "s":
        table.pop("r" + key, None)


def all_candidates(rows: int, case: Case, kinds: list[str]) -> list[Any]:
    """Of these kinds: ring, other."""
    found: list[Any] = []
    if "ring" in kinds and rows > 1:
        found += ring_candidates(rows, case)
    if "other" in kinds:
        found += candidates(rows, case)
    return found


def tune(
    models: list[str],
    row_counts: list[int],
    limit: int,
    path: Path,
    kinds: list[str],
    compile_only: bool = False,
) -> None:
    """Write the fastest shape of every (rows, case) to ``path``, beside what is there."""
    table: dict[str, list[int]] = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = threading.local()
    rule, stream_rule = linear._shape, triton_stream._shape
    linear._shape = lambda *args: getattr(chosen, "shape", None) or rule(*args)
    triton_stream._shape = lambda *args: getattr(chosen, "shape", None) or stream_rule(*args)
    for name, rows in itertools.product(models, row_counts):
        prepared = [
            (case, case.make(rows), [*_some(all_candidates(rows, case, kinds), limit), _rule(rows, case)])
            for case in cases_of(name)
        ]

        def compile_job(run: Callable[[int], object], shape: Any) -> Callable[[], None]:
            def job() -> None:
                chosen.shape = shape
                run(0)

            return job

        compile_all([compile_job(run, shape) for _, run, shapes in prepared for shape in shapes])
        if compile_only:
            continue
        for case, run, shapes in prepared:
            results = []
            for shape in shapes:
                chosen.shape = shape
                try:
                    results.append((graph_seconds(run, case.copies, 7), shape))
                except Exception as error:
                    print("failed:", shape, type(error).__name__, str(error)[:100], flush=True)
                    torch.cuda.synchronize()
            results.sort()
            chosen.shape = None
            base = graph_seconds(run, case.copies, 7)
            best, shape = results[0]
            _note(table, tuning._key(rows, case.n, case.k, case.gate), shape, best < base)
            top = " ".join(f"{'/'.join(map(str, s))}={t * 1e6:.1f}" for t, s in results[:8])
            key = f"{rows}:{case.n}x{case.k}"
            print(f"{key:16s} now {base * 1e6:7.1f} us, best {best * 1e6:7.1f} us "
                  f"{case.bytes / best / 1e12:.2f} TB/s | {top}", flush=True)  # fmt: skip
        lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(table.items()))
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        del prepared
        torch.cuda.empty_cache()
    linear._shape, triton_stream._shape = rule, stream_rule
    tuned.cache_clear()


def bench_linear(recorder: Recorder, models: list[str], row_counts: list[int]) -> None:
    """All linear maps of a step in one graph, ours and cuBLAS's."""
    rates = ceilings()
    for name in models:
        cases, layers = cases_of(name), model_config(name)["num_hidden_layers"]
        for rows in row_counts:
            runs = [case.make(rows) for case in cases]
            total = sum(c.bytes for c in cases[:4]) * layers + cases[4].bytes

            def step(_: int, runs: Any = runs, cases: Any = cases, layers: int = layers) -> None:
                for layer in range(layers):
                    for run, case in zip(runs[:4], cases[:4]):
                        run(layer % case.copies)
                runs[4](0)

            def plain(_: int, cases: Any = cases, layers: int = layers) -> None:
                for layer in range(layers):
                    for case in cases[:4]:
                        case.torch_run(layer % case.copies)

            floor = None if rates is None else total / rates[0]
            recorder.row(model=name, precision="bf16", case=f"linears of a step, {rows} rows", metric="seconds",
                         value=graph_seconds(step, 1), floor=floor)  # fmt: skip
            recorder.row(model=name, precision="bf16", case=f"cuBLAS without head, {rows} rows", metric="seconds",
                         value=graph_seconds(plain, 1),
                         floor=None if rates is None else (total - cases[4].bytes) / rates[0])  # fmt: skip
            del runs
            torch.cuda.empty_cache()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--what", nargs="+", default=["linear"], help="linear, or none to tune only")
    parser.add_argument("--models", nargs="+", default=["qwen3-0.6b", "qwen3-8b"])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument(
        "--compile-only", action="store_true", help="fill Triton's cache for --tune, no timing"
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 32, 64])
    parser.add_argument("--bench-rows", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--kinds", nargs="+", default=["ring", "other"], help="of candidates")
    parser.add_argument("--limit", type=int, default=40, help="candidates of one case at most")
    parser.add_argument("--tuned", help="file to write, instead of the one in the package")
    args = parser.parse_args()
    recorder = Recorder("kernels", args)
    if args.tune:
        name = device_name().lower().replace(" ", "-")
        path = Path(args.tuned or Path(tuning.__file__).parent / "tuned" / f"{name}.json")
        tune(args.models, args.rows, args.limit, path, args.kinds, args.compile_only)
    if "linear" in args.what:
        bench_linear(recorder, args.models, args.bench_rows)


if __name__ == "__main__":
    main()
