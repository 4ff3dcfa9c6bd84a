"""Shapes of the kernels over experts' 4-bit weights: times all candidates of a model's layer, and prints the best.

    python -m benchmarks.tune_experts --model gpt-oss-20b --scheme mxfp4 --tokens 1,16,64
    python -m benchmarks.tune_experts --model qwen3-30b-a3b --scheme fp4 --write   # into kernels/experts/tuned

Figures are microseconds: medians over replays of a CUDA graph in which each call has other tokens.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import arguments, device_name, model_config
from benchmarks.experts import DEVICE, build
from benchmarks.kernels import compile_all, graph_seconds
from headrace.kernels.experts import plan_experts, route, tuning
from headrace.kernels.experts.triton_codes import expert_codes
from headrace.kernels.experts.tuning import ExpertCodesShape
from headrace.layers.experts import MixtureOfExperts
from headrace.models.registry import read_config
from headrace.quantization.device import tiles

CALLS = 6
MANY = ((4, 4, 4), (4, 4, 3), (8, 4, 3), (8, 8, 3), (8, 4, 2))  # tiles, warps, stages


def candidates(block: int, most: int, gated: bool) -> list[ExpertCodesShape]:
    """Worth trying for blocks of ``block`` rows, of which ``most`` at most hold something."""
    found = []
    for bm, tiles_of, warps in itertools.product((8, 16, 32), (1, 2, 4), (1, 2, 4, 8)):
        fits = bm <= max(8, min(most, block)) and tiles_of * bm <= 64 and not (gated and tiles_of == 1)
        if fits and tiles_of * warps <= 16:
            found.append(ExpertCodesShape(bm, tiles_of, warps))
    if most > 8:
        found += [ExpertCodesShape(block, t, w, tuning.MANY, stages) for t, w, stages in MANY]
        wide = ((16, 8), (8, 4)) if gated else ((16, 8), (8, 8), (8, 4), (4, 4))
        found += [
            ExpertCodesShape(block, t, w, tuning.WIDE, 4) for t, w in wide if block < 128 or t <= 2 * w <= 16
        ]
    return found


def jobs(
    mixture: MixtureOfExperts, tokens: int, hidden: int
) -> list[tuple[str, ExpertCodesShape, Callable[[int], object]]]:
    """(key of the tuned table, shape, its product) of both projections."""
    xs = [torch.randn(tokens, hidden, dtype=torch.bfloat16, device=DEVICE) for _ in range(CALLS)]
    chosen = [route(mixture.router(x), mixture.experts_per_token, renormalize=True)[1] for x in xs]
    plans = [plan_experts(each, mixture.num_experts) for each in chosen]
    rows = mixture.experts_per_token * tokens
    block, most = plans[0].block, min(plans[0].block, tokens)
    how_full = tuning.codes_rows(rows, mixture.num_experts, block)
    found: list[tuple[str, ExpertCodesShape, Callable[[int], object]]] = []
    for name, gate in (("gate_up", mixture.activation), ("down", None)):
        part: Any = getattr(mixture.experts, name)
        weight = part.held
        n, k = weight.shape[0] // mixture.num_experts, weight.shape[1]
        inputs: list[Tensor] = xs
        if gate is None:
            inputs = [torch.randn(rows, k, dtype=torch.bfloat16, device=DEVICE) for _ in range(CALLS)]
        key = tuning.codes_key(how_full, n, k, weight.group, gate is not None)

        def run(
            i: int, shape: ExpertCodesShape, part: Any = part, inputs: Any = inputs, gate: Any = gate
        ) -> object:
            held = part.held
            return expert_codes(
                inputs[i % CALLS], plan=plans[i % CALLS], rows=held.shape[0], bias=part.bias, gate=gate, shape=shape,
                **tiles(held),
            )  # fmt: skip

        for shape in candidates(block, most, gate is not None):
            found.append((key, shape, partial(run, shape=shape)))
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="gpt-oss-20b")
    parser.add_argument("--scheme", default="mxfp4")
    parser.add_argument("--tokens", default="1,16,64")
    parser.add_argument("--kinds", default="", help="only these kinds of shapes, as digits")
    parser.add_argument("--compile", action="store_true", help="compile only")
    parser.add_argument("--write", action="store_true", help="the best into the package's table")
    args = parser.parse_args()
    config = read_config(model_config(args.model))
    mixture = build(config, args.scheme)
    best: dict[str, list[Any]] = {}
    for tokens in map(int, args.tokens.split(",")):
        runs = jobs(mixture, tokens, config.hidden_size)
        runs = [found for found in runs if not args.kinds or str(found[1].kind) in args.kinds]
        compile_all([partial(run, 0) for *_, run in runs])
        if args.compile:
            continue
        times: dict[str, list[tuple[float, ExpertCodesShape]]] = {}
        for key, shape, run in runs:
            try:
                times.setdefault(key, []).append((graph_seconds(run, CALLS, 7) * 1e6, shape))
            except Exception as error:  # a shape that does not fit is no candidate
                print("failed:", shape, type(error).__name__, str(error)[:80], flush=True)
                torch.cuda.synchronize()
        for key, found in times.items():
            found.sort()
            best[key] = [int(v) for v in found[0][1]]
            shown = " ".join(f"{'/'.join(str(int(v)) for v in s)}={t:.1f}" for t, s in found[:7])
            print(f"{args.model} {tokens} tokens {key} | {shown} | worst {found[-1][0]:.1f}", flush=True)
    if args.write:
        path = Path(tuning.__file__).parent / "tuned" / f"{device_name().lower().replace(' ', '-')}.json"
        path.parent.mkdir(exist_ok=True)
        table = json.loads(path.read_text()) if path.exists() else {}
        lines = (f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted((table | best).items()))
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
