"""One mixture of experts (router, plan, both products, sum) by number of tokens, against what the hardware allows.

    python -m benchmarks.experts --record
    python -m benchmarks.experts --schemes bf16,fp4 --tokens 1,16

Figures are medians over replays of a CUDA graph in which each call has other tokens, so that other experts are chosen.
The floor is the larger of two: bytes of the chosen experts over the rate of copies, and operations over bf16's rate.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Recorder, arguments, ceilings, model_config
from benchmarks.kernels import graph_seconds
from headrace.config.quantization import quantization_type
from headrace.kernels.experts import combine, plan_experts, route
from headrace.layers.experts import ExpertLinear, MixtureOfExperts
from headrace.models.declaration import DecoderConfig
from headrace.models.decoder import _Builder
from headrace.models.registry import read_config
from headrace.quantization.registry import load_time

DEVICE = torch.device("cuda")
RATES = (4.0e12, 790e12)  # bytes/s of a copy and bf16 FLOP/s, of an H200, where they were not measured


def build(config: DecoderConfig, scheme: str) -> MixtureOfExperts:
    """One layer's mixture with random weights."""
    assert config.experts is not None
    mixture = _Builder(config, torch.bfloat16, DEVICE).mixture(config.experts)
    for parameter in mixture.parameters():
        parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
    if scheme != "bf16":
        transform = load_time(quantization_type(scheme), DEVICE)
        for name in ("gate_up", "down"):
            module = getattr(mixture.experts, name)
            assert isinstance(module, ExpertLinear)
            setattr(mixture.experts, name, transform(f"layers.0.mlp.experts.{name}", module))
            del module
            torch.cuda.empty_cache()
    return mixture


def nbytes(mixture: MixtureOfExperts) -> int:
    """Of all experts' weights."""
    parts: Any = (mixture.experts.gate_up, mixture.experts.down)
    return sum(part.weight.nbytes if isinstance(part, ExpertLinear) else part.nbytes for part in parts)


def steps(mixture: MixtureOfExperts, xs: list[Tensor]) -> dict[str, Callable[[int], object]]:
    """Each kernel alone, over the same inputs."""
    experts, count = mixture.experts, len(xs)
    logits = [mixture.router(x) for x in xs]
    routes = [route(each, mixture.experts_per_token, renormalize=True) for each in logits]
    plans = [plan_experts(chosen, mixture.num_experts) for _, chosen in routes]
    inner = [experts.gate_up(x, plan, mixture.activation) for x, plan in zip(xs, plans)]
    parts = [experts.down(x, plan) for x, plan in zip(inner, plans)]
    return {
        "all": lambda i: mixture(xs[i % count]),
        "router": lambda i: mixture.router(xs[i % count]),
        "route": lambda i: route(logits[i % count], mixture.experts_per_token, renormalize=True),
        "plan": lambda i: plan_experts(routes[i % count][1], mixture.num_experts),
        "gate_up": lambda i: experts.gate_up(xs[i % count], plans[i % count], mixture.activation),
        "down": lambda i: experts.down(inner[i % count], plans[i % count]),
        "combine": lambda i: combine(parts[i % count], routes[i % count][0]),
    }


def measure(recorder: Recorder, config: DecoderConfig, scheme: str, args: argparse.Namespace) -> None:
    """All numbers of tokens, of one type."""
    experts = config.experts
    assert experts is not None
    copies, flops = ceilings() or RATES
    mixture = build(config, scheme)
    for tokens in map(int, args.tokens.split(",")):
        count = 8 if tokens <= 64 else 3
        shape = (tokens, config.hidden_size)
        xs = [torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(count)]
        chosen = [route(mixture.router(x), experts.experts_per_token, renormalize=True)[1] for x in xs]
        used = statistics.mean(len(each.unique()) for each in chosen)
        work = 6 * tokens * experts.experts_per_token * config.hidden_size * experts.intermediate_size
        floor = max(nbytes(mixture) * used / experts.num_experts / copies, work / flops)
        runs = steps(mixture, xs)
        seconds = graph_seconds(runs["all"], count)
        recorder.row(
            model=args.model, precision=scheme, case=f"{tokens} tokens", metric="seconds", value=seconds, floor=floor,
            experts=used,
        )  # fmt: skip
        if args.parts:
            took = {name: round(graph_seconds(run, count) * 1e6, 1) for name, run in runs.items()}
            print(scheme, tokens, took, flush=True)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="qwen3-30b-a3b")
    parser.add_argument("--schemes", default="bf16,fp8,fp4")
    parser.add_argument("--tokens", default="1,16,64,512,4096")
    parser.add_argument("--parts", action="store_true", help="the time of each kernel, too")
    args = parser.parse_args()
    recorder = Recorder("experts", args)
    for scheme in args.schemes.split(","):
        measure(recorder, read_config(model_config(args.model)), scheme, args)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
