"""Products of few rows over weights of few bits, beside bf16 and torch's scaled product, on a model's shapes.

    python -m benchmarks.quantized --model qwen3-8b --record
    python -m benchmarks.quantized --sweep          # other tile shapes, to choose from

Each figure is a median over replays of a CUDA graph that walks over enough different weights not to fit the cache,
with the rounding of activations included for FP8. Bytes are those of the weights and their scales.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Recorder, arguments, model_config
from benchmarks.kernels import graph_seconds
from headrace.config.quantization import quantization_type
from headrace.kernels.linear.triton import small_linear
from headrace.kernels.quantized_linear import triton as kernels
from headrace.layers.linear import Linear
from headrace.quantization import device as scaled
from headrace.quantization.registry import load_time
from headrace.quantization.scaled import ScaledLinear

DEVICE = torch.device("cuda")
SPREAD = 192 << 20  # bytes that one graph walks over
SWEEP = [
    kernels.PackedShape(*shape)
    for shape in itertools.chain(
        itertools.product((64, 128), (128, 256), (1, 2, 4), (4,), (3, 4)),
        [(128, 128, 1, 8, 4), (128, 128, 2, 8, 4), (64, 512, 1, 4, 3), (32, 256, 2, 4, 4), (64, 64, 4, 4, 5)],
    )
]


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


def measure(run: Callable[[int], object], nbytes: int) -> tuple[float, float]:
    """Seconds and bytes/s."""
    seconds = graph_seconds(run, max(8, 2 * SPREAD // nbytes))
    return seconds, nbytes / seconds


def torch_linear(weights: list[Tensor], x: Tensor, i: int) -> Tensor:
    return F.linear(x, weights[i % len(weights)])


def plain_linear(weights: list[Tensor], x: Tensor, gate: str | None, i: int) -> Tensor:
    return small_linear(x, weights[i % len(weights)], gate=gate)


def packed_linear(linears: list[ScaledLinear], x: Tensor, gate: str | None, i: int) -> Tensor:
    return scaled.fused(linears[i % len(linears)], x, gate=gate)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="qwen3-8b")
    parser.add_argument("--schemes", nargs="+", default=["fp8", "nvfp4", "int4-g128"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--sweep", action="store_true")
    args = parser.parse_args()
    recorder = Recorder("quantized", args)
    totals: dict[tuple[str, int], float] = {}

    def note(scheme: str, rows: int, name: str, seconds: float, rate: float) -> None:
        totals[scheme, rows] = totals.get((scheme, rows), 0.0) + seconds
        recorder.row(
            model=args.model, precision=scheme, case=f"{name} M={rows}", metric="bytes_s", value=rate
        )

    for name, (n, k, gate) in shapes(args.model).items():
        copies = max(2, SPREAD // (n * k * 2))
        dense = [torch.randn(n, k, dtype=torch.bfloat16, device=DEVICE) for _ in range(copies)]
        inputs = {rows: torch.randn(rows, k, dtype=torch.bfloat16, device=DEVICE) for rows in args.rows}
        for rows, x in inputs.items():
            note("bf16 torch", rows, name, *measure(partial(torch_linear, dense, x), n * k * 2))
            plain = partial(plain_linear, dense, x, gate)
            note("bf16", rows, name, *measure(plain, n * k * 2))
        del dense
        for scheme in args.schemes:
            first = packed(scheme, n, k)
            linears = [first, *(packed(scheme, n, k) for _ in range(max(1, SPREAD // first.nbytes)))]
            for rows, x in inputs.items():
                if args.sweep and rows > 1:
                    sweep(linears, x, gate, f"{scheme} {name} M={rows}")
                note(scheme, rows, name, *measure(partial(packed_linear, linears, x, gate), first.nbytes))
            if scheme == "fp8":
                torch_scaled(
                    linears, inputs, lambda *facts, name=name: note("fp8 torch", facts[0], name, *facts[1:])
                )
    for (scheme, rows), seconds in totals.items():
        row = {"model": args.model, "precision": scheme, "case": f"one layer M={rows}"}
        recorder.row(**row, metric="seconds", value=seconds)


def torch_scaled(
    linears: list[ScaledLinear], inputs: dict[int, Tensor], note: Callable[[int, float, float], None]
) -> None:
    """torch._scaled_mm with scales for rows, its activations rounded by our kernel."""
    for rows, x in inputs.items():
        if rows < 16:
            continue

        def run(i: int, x: Tensor = x) -> object:
            linear = linears[i % len(linears)]
            codes, scale = kernels.quantize_rows(x)
            return torch._scaled_mm(
                codes,
                linear.quantized.codes.t(),
                scale_a=scale,
                scale_b=scaled.row_scales(linear)[None, :],
                out_dtype=torch.bfloat16,
            )

        note(rows, *measure(run, linears[0].nbytes))


def sweep(linears: list[ScaledLinear], x: Tensor, gate: str | None, label: str) -> None:
    """Print the best tile shapes."""
    original = kernels.packed_shape
    found = []

    def under(shape: kernels.PackedShape) -> Callable[[int], object]:
        def run(i: int) -> object:
            kernels.packed_shape = lambda *_: shape
            return scaled.fused(linears[i % len(linears)], x, gate=gate)

        return run

    try:
        for shape in SWEEP:
            try:
                _, rate = measure(under(shape), linears[0].nbytes)
            except Exception as error:  # a tile that does not fit shared memory is no candidate
                print(label, shape, type(error).__name__, flush=True)
                continue
            found.append((rate, shape))
    finally:
        kernels.packed_shape = original
    for rate, shape in sorted(found, reverse=True)[:3]:
        print(label, f"{rate / 1e12:.2f} TB/s", tuple(shape), flush=True)


if __name__ == "__main__":
    main()
