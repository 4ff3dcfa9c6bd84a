"""Products of few rows over weights of few bits, beside bf16 and torch's scaled product, on a model's shapes.

    python -m benchmarks.quantized --model qwen3-8b --record
    python -m benchmarks.quantized --tune     # writes src/headrace/kernels/quantized_linear/tuned/<gpu>.json

Each figure is a median over replays of a CUDA graph that walks over enough different weights not to fit the cache,
with the rounding of activations included for FP8. Floors: weights, scales, rows and outputs at the rate of copies, or
operations at bf16's rate (FP8: twice that), whichever takes longer. ``times_bf16`` is against the faster of torch's
product and our own kernel, of up to 64 rows with the gate.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Recorder, arguments, ceilings, device_name, model_config
from benchmarks.kernels import compile_all, graph_seconds
from headrace.config.quantization import quantization_type
from headrace.kernels.attention.decode_shapes import is_long
from headrace.kernels.attention.fp4 import FP4
from headrace.kernels.attention.triton_decode import DecodeWorkspace, decode_attention
from headrace.kernels.linear.triton import small_linear
from headrace.kernels.linear.tuning import GemvShape
from headrace.kernels.quantized_linear import triton as kernels
from headrace.kernels.quantized_linear import tuning
from headrace.kernels.quantized_linear.triton_codes import four_bit_product
from headrace.kernels.quantized_linear.triton_gemv import fp8_gemv
from headrace.kernels.quantized_linear.tuning import CodesShape, PackedShape, padded_rows
from headrace.kvcache.pool import allocate_caches
from headrace.layers.linear import Linear
from headrace.quantization import device as scaled
from headrace.quantization.registry import load_time
from headrace.quantization.scaled import ScaledLinear

DEVICE = torch.device("cuda")
RATES = (4.0e12, 790e12)  # bytes/s of a copy and bf16 FLOP/s, of an H200, where they were not measured
SPREAD = 192 << 20  # bytes that one graph walks over


def shapes(model: str) -> dict[str, tuple[int, int, str | None]]:
    """Name -> (outputs, inputs, gate)."""
    c = model_config(model)
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    q, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    return {
        "qkv": (q + 2 * kv, hidden, None),
        "o": (hidden, q, None),
        "gate_up": (2 * inner, hidden, "silu"),
        "down": (hidden, inner, None),
    }


def packed(scheme: str, n: int, k: int) -> ScaledLinear:
    linear = Linear(k, n, dtype=torch.bfloat16, device=DEVICE)
    linear.weight.data.normal_(0, 0.02)
    made = load_time(quantization_type(scheme), DEVICE)("layers.0.mlp.down", linear)
    assert isinstance(made, ScaledLinear)
    return made


def torch_linear(weights: list[Tensor], x: Tensor, i: int) -> Tensor:
    return F.linear(x, weights[i % len(weights)])


def plain_linear(weights: list[Tensor], x: Tensor, gate: str | None, i: int) -> Tensor:
    return small_linear(x, weights[i % len(weights)], gate=gate)


def packed_linear(linears: list[ScaledLinear], x: Tensor, gate: str | None, i: int) -> Tensor:
    if x.shape[0] > kernels.MAX_ROWS:
        return scaled.product(linears[i % len(linears)], x)
    return scaled.fused(linears[i % len(linears)], x, gate=gate)


def cache_slope(
    recorder: Recorder, model: str, count: int = 16, lengths: tuple[int, int] = (4096, 32768)
) -> None:
    """How much longer a decode step's attention takes for each further key of every sequence, by the cache's format."""
    c = model_config(model)
    heads, kv, dim = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    slopes = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn), ("fp4", FP4)):
        seconds = []
        for length in lengths:
            per = length // 16
            caches = allocate_caches([(kv, dim)] * 2, count * per + 1, 16, dtype, DEVICE)
            for cache in caches:
                cache.k.view(torch.uint8).random_(0, 100)
                cache.v.view(torch.uint8).random_(0, 100)
            tables = (torch.randperm(count * per, device=DEVICE).int() + 1).view(count, per)
            lens = torch.full((count,), length, dtype=torch.int32, device=DEVICE)
            q = torch.randn(count, heads, dim, dtype=torch.bfloat16, device=DEVICE)
            space = DecodeWorkspace.allocate(count, heads, kv, dim, DEVICE)

            long = is_long(count * kv, dim, length)
            rest: Any = (tables, lens, space)

            def run(i: int, caches: Any = caches, q: Tensor = q, rest: Any = rest, long: bool = long) -> None:
                decode_attention(q, caches[i % 2].k, caches[i % 2].v, *rest, scale=0.088, long=long)

            seconds.append(graph_seconds(run, 4))
            del caches
        slopes[name] = (seconds[1] - seconds[0]) / (lengths[1] - lengths[0])
        recorder.row(
            model=model, precision=f"{name} cache", case=f"attention of a layer, {count} sequences, {lengths} keys",
            metric="seconds_per_key", value=slopes[name], seconds=[float(f"{t:.4g}") for t in seconds],
            of_bf16=round(slopes[name] / slopes["bf16"], 3),
        )  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="qwen3-8b")
    parser.add_argument("--schemes", nargs="+", default=["fp8", "nvfp4", "int4-g128"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 64, 512])
    parser.add_argument("--tune", action="store_true", help="write tile shapes instead")
    parser.add_argument("--cache", action="store_true", help="attention over caches of each format instead")
    parser.add_argument("--limit", type=int, default=24, help="candidates of one case at most")
    parser.add_argument("--seconds", type=float, default=600.0, help="for tuning")
    parser.add_argument("--tuned", help="file to write, instead of the one in the package")
    args = parser.parse_args()
    recorder = Recorder("quantized", args)
    if args.cache:
        cache_slope(recorder, args.model)
        return
    if args.tune:
        path = (
            args.tuned
            or Path(tuning.__file__).parent / "tuned" / f"{device_name().lower().replace(' ', '-')}.json"
        )
        tune(args.model, args.schemes, args.rows, Path(path), args.limit, args.seconds)
        return
    maps(recorder, args.model, args.schemes, args.rows)


class Layer:
    """Rows of one layer's linear maps, and their sums; each with its floor and how many times bf16's speed it is."""

    def __init__(self, recorder: Recorder, model: str) -> None:
        self.recorder, self.model = recorder, model
        self.seconds: dict[tuple[str, int], float] = {}
        self.floors: dict[tuple[str, int], float] = {}
        self.plain: dict[tuple[str, int], float] = {}  # of (map, rows), the faster bf16 product

    def note(self, precision: str, rows: int, name: str, n: int, k: int, nbytes: int, seconds: float) -> None:
        """One map's product; ``nbytes`` of its weights."""
        copies, flops = ceilings() or RATES
        work = 2.0 * rows * n * k / (flops * (2 if precision.startswith("fp8") else 1))
        floor = max((nbytes + 2 * rows * (n + k)) / copies, work)
        if precision.startswith("bf16"):
            self.plain[name, rows] = min(seconds, self.plain.get((name, rows), seconds))
        for total, value in ((self.seconds, seconds), (self.floors, floor)):
            total[precision, rows] = total.get((precision, rows), 0.0) + value
        self._row(precision, f"{name} M={rows}", seconds, floor, self.plain.get((name, rows)))

    def total(self) -> None:
        """Rows of the sums, and a table of them."""
        plain: dict[int, float] = {}
        for (_, rows), seconds in self.plain.items():
            plain[rows] = plain.get(rows, 0.0) + seconds
        for (precision, rows), seconds in self.seconds.items():
            scaled_mm = self.seconds.get(("fp8 torch", rows)) if precision == "fp8" else None
            more = {} if scaled_mm is None else {"times_scaled_mm": round(scaled_mm / seconds, 3)}
            floor = self.floors[precision, rows]
            self._row(precision, f"one layer M={rows}", seconds, floor, plain.get(rows), **more)
        print(f"{'one layer, us':16}" + "".join(f"{f'M={rows} (floor) x bf16':>26}" for rows in plain))
        for precision in dict.fromkeys(name for name, _ in self.seconds):
            cells = [
                (self.seconds.get((precision, m)), self.floors.get((precision, m), 0.0), plain[m])
                for m in plain
            ]
            shown = [f"{t * 1e6:.1f} ({f * 1e6:.1f}) {b / t:.2f}" if t else "-" for t, f, b in cells]
            print(f"{precision:16}" + "".join(f"{text:>26}" for text in shown), flush=True)

    def _row(
        self, precision: str, case: str, seconds: float, floor: float, plain: float | None, **more: float
    ) -> None:
        self.recorder.row(
            model=self.model, precision=precision, case=case, metric="seconds", value=seconds, floor=floor,
            times_bf16=None if plain is None else round(plain / seconds, 3), **more,
        )  # fmt: skip


def maps(recorder: Recorder, model: str, schemes: list[str], row_counts: list[int]) -> None:
    """bf16 through torch and through our kernels, every scheme, and torch's own scaled product."""
    layer = Layer(recorder, model)
    for name, (n, k, gate) in shapes(model).items():
        copies = max(2, SPREAD // (n * k * 2))
        dense = [torch.randn(n, k, dtype=torch.bfloat16, device=DEVICE) for _ in range(copies)]
        inputs = {rows: torch.randn(rows, k, dtype=torch.bfloat16, device=DEVICE) for rows in row_counts}

        def note(
            scheme: str, rows: int, nbytes: int, run: Callable[[int], object], name: str = name, n: int = n, k: int = k
        ) -> None:  # fmt: skip
            seconds = graph_seconds(run, max(8, 2 * SPREAD // nbytes))
            layer.note(scheme, rows, name, n, k, nbytes, seconds)

        for rows, x in inputs.items():
            note("bf16 torch", rows, n * k * 2, partial(torch_linear, dense, x))
            if rows <= kernels.MAX_ROWS:
                note("bf16", rows, n * k * 2, partial(plain_linear, dense, x, gate))
        del dense
        for scheme in schemes:
            first = packed(scheme, n, k)
            linears = [first, *(packed(scheme, n, k) for _ in range(max(1, SPREAD // first.nbytes)))]
            for rows, x in inputs.items():
                note(scheme, rows, first.nbytes, partial(packed_linear, linears, x, gate))
                if scheme == "fp8" and rows >= 16:
                    note("fp8 torch", rows, first.nbytes, partial(torch_scaled, linears, x))
    layer.total()


def torch_scaled(linears: list[ScaledLinear], x: Tensor, i: int) -> object:
    """torch._scaled_mm with scales for rows, its activations rounded by our kernel."""
    linear = linears[i % len(linears)]
    codes, scale = kernels.quantize_rows(x)
    return torch._scaled_mm(
        codes, linear.held.codes.t(), scale_a=scale, scale_b=scaled.row_scales(linear)[None, :],
        out_dtype=torch.bfloat16,
    )  # fmt: skip


def candidates(scheme: str, rows: int, n: int, k: int, gated: bool) -> list[Any]:
    """Tile shapes worth trying; n counts both halves."""
    outputs = n // 2 if gated else n
    double = 2 if gated else 1
    found: list[Any] = []
    if rows == 1 and scheme == "fp8":
        for bn, bk, warps in itertools.product((1, 2, 4, 8, 16), (512, 1024, 2048, 4096), (2, 4, 8)):
            if 16 <= bn * bk // (32 * warps) * double <= 128 and bk >= 128 * warps and k % bk == 0:
                found.append(GemvShape(bn, bk, warps, 1))
        return found
    bm = padded_rows(rows)
    if scheme == "fp8":
        for bn, bk, splits, stages, warps in itertools.product(
            (64, 128), (128, 256), (1, 2, 4, 8), (3, 4, 6), (4, 8)
        ):
            shared = stages * (bn * double + bm) * bk
            programs = -(-outputs // bn) * splits
            fits = shared <= 200_000 and k // (splits * bk) >= 2 and 90 <= programs <= 800
            if fits and not (bn == 64 and warps == 8):
                found.append(PackedShape(bn, bk, splits, warps, stages))
        return found
    blocks = -(-k // 128)
    for tiles, warps, splits in itertools.product((1, 2, 4), (1, 2, 4, 8, 16), (1, 2, 4, 8)):
        programs = -(-n // (16 * tiles)) * splits
        fits = tiles * bm * warps <= 256 and (tiles > 1 or not gated) and blocks % (warps * splits) == 0
        if fits and 100 <= programs <= 3100 and 500 <= programs * warps <= 12500:
            found.append(CodesShape(tiles, warps, splits))
    return found


def under(linears: list[ScaledLinear], x: Tensor, gate: str | None, shape: Any) -> Callable[[int], object]:
    """The product alone (activations rounded before), with one tile shape."""
    common: dict[str, Any] = {"gate": gate, "out_dtype": x.dtype, "shape": shape}
    if isinstance(shape, GemvShape):

        def one_row(i: int) -> object:
            linear = linears[i % len(linears)]
            return fp8_gemv(x, linear.held.codes, scaled.row_scales(linear), **common)

        return one_row
    if isinstance(shape, PackedShape):
        codes, scale = kernels.quantize_rows(x)

        def run(i: int) -> object:
            linear = linears[i % len(linears)]
            return kernels.small_product(codes, scaled.eight_bits(linear), x_scale=scale, **common)

        return run

    def four_bits(i: int) -> object:
        weight = linears[i % len(linears)].held
        return four_bit_product(x, **scaled.tiles(weight), rows=weight.shape[0], **common)

    return four_bits


def tile_rows(form: str, rows: int) -> int:
    """Rows as tuned tables count them."""
    if form == "fp8" and rows == 1:
        return 1
    return padded_rows(rows) if form in ("fp4", "int4") else max(16, padded_rows(rows))


def tune(
    model: str, schemes: list[str], row_counts: list[int], path: Path, limit: int, seconds: float
) -> None:
    """Write the fastest tile shape of every case to ``path``, beside what is there, while time lasts."""
    table: dict[str, list[int]] = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    for rows, scheme in itertools.product(row_counts, schemes):
        jobs = []
        for name, (n, k, gate) in shapes(model).items():
            first = packed(scheme, n, k)
            linears = [first, *(packed(scheme, n, k) for _ in range(max(1, SPREAD // first.nbytes)))]
            x = torch.randn(rows, k, dtype=torch.bfloat16, device=DEVICE)
            tried = candidates(scheme, rows, n, k, gate is not None)
            tried = random.Random(1).sample(tried, min(limit, len(tried)))
            jobs.append(
                (
                    name,
                    n,
                    k,
                    gate,
                    linears,
                    [(shape, under(linears, x, gate, shape)) for shape in tried],
                )
            )
        compile_all([partial(run, 0) for *_, runs in jobs for _, run in runs])
        for name, n, k, gate, linears, runs in jobs:
            if time.perf_counter() - began > seconds:
                print("out of time before", scheme, rows, name, flush=True)
                return
            results = []
            for shape, run in runs:
                try:
                    results.append((graph_seconds(run, max(8, 2 * SPREAD // linears[0].nbytes), 5), shape))
                except Exception as error:  # a tile that does not fit shared memory is no candidate
                    print("failed:", shape, type(error).__name__, str(error)[:80], flush=True)
                    torch.cuda.synchronize()
            results.sort()
            form = "fp4" if scheme.endswith("fp4") else scheme.split("-")[0]
            table[f"{form}:{tile_rows(form, rows)}:{n}x{k}{'g' if gate else ''}"] = list(results[0][1])
            top = " ".join(f"{'/'.join(map(str, s))}={t * 1e6:.1f}" for t, s in results[:5])
            rate = linears[0].nbytes / results[0][0] / 1e12
            print(f"{scheme} {name} M={rows} {rate:.2f} TB/s | {top} | worst {results[-1][0] * 1e6:.1f} "
                  f"at {time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
            lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(table.items()))
            path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        del jobs
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
