"""Generation, offline: token ids in, fixed output lengths, random weights of a real shape made on the device.

    python -m benchmarks.generate --model qwen3-0.6b --cases 1x128/256 16x128/256 --record

Output tokens over the wall time of the whole batch, after one warm-up run of the same case. The floor takes each
step at the larger of bytes and arithmetic (headrace/engines/bench/floors.py). `headrace bench` is the same for people.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Recorder, arguments, ceilings, device_name, model_config
from headrace.engines.bench.cases import Measurement, measure, parse_case
from headrace.engines.bench.cores import build_core, random_model
from headrace.engines.bench.floors import Work
from headrace.engines.bench.profile import WindowProfiler
from headrace.engines.bench.report import summary
from headrace.engines.generate import GenerateCore
from headrace.execution.constraints.table import PendingMasks
from headrace.layers.linear import FixedLinear
from headrace.scheduling.plan import StepPlan

FILTERS = {"top_k": int, "top_p": float, "min_p": float, "repetition_penalty": float, "logprobs": int}
CASES = ["1x128/256", "1x4096/1", "16x128/256", "64x512/128", "256x1024/128", "1024x128/128"]


class HalfMasks:
    """Forbids a random half of the tokens to every row: what grammars cost the device, without their own work."""

    def __init__(self, rows: int, vocab: int, device: torch.device) -> None:
        shape = (rows, -(-vocab // 32))
        generator = torch.Generator().manual_seed(0)
        self.bits = torch.randint(-(2**31), 2**31, shape, generator=generator).int()
        self.device = device

    def begin(self, plan: StepPlan, *, ahead: bool) -> PendingMasks | None:
        """As ConstraintTable.begin."""
        count, words = len(plan.sampling), self.bits.shape[1]
        if not count:
            return None
        host = torch.empty(count * words + count, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        host[: count * words] = self.bits[:count].view(-1)
        host[count * words :] = torch.arange(count)
        return PendingMasks(host, count, words, self.device, None)


def flags() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="qwen3-0.6b")
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for a quick look")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", default="", help="a type of config/quantization.py")
    parser.add_argument("--only", default="", help="quantize linears with this in their path: .experts.")
    parser.add_argument("--kv-cache-dtype", choices=["fp8"], help="instead of --dtype")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--step-tokens", type=int, default=8192)
    parser.add_argument("--temperature", type=float, default=0.0)
    for name, kind in FILTERS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind, help="as in SamplingParams")
    parser.add_argument("--masked", action="store_true", help="forbid half of the tokens to every row")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument(
        "--profile", metavar="DIR", help="write a page about each case (headrace bench --profile)"
    )
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument(
        "--slow-host", type=float, default=0.0, help="milliseconds that each turn of the loop wastes"
    )
    parser.add_argument("--most-repeats", type=int, help="of a decode step in one turn of the host")
    return parser.parse_args()


def main() -> None:
    args = flags()
    recorder = Recorder("generate", args)
    config = dict(model_config(args.model))
    if args.layers:
        config["num_hidden_layers"] = args.layers
    model = random_model(
        config,
        dtype=getattr(torch, args.dtype),
        device=torch.device(args.device),
        quantization=args.quantization,
        only=args.only,
    )
    if args.deterministic:
        FixedLinear.fix(model)
    sampling = {name: value for name in FILTERS if (value := getattr(args, name)) is not None}
    sampling["temperature"] = args.temperature
    cache = torch.float8_e4m3fn if args.kv_cache_dtype else None
    precision = args.quantization or args.dtype
    precision += f" in {args.only.strip('.')}" if args.only else ""
    precision += "+fp8kv" if args.kv_cache_dtype else ""
    cases = [parse_case(text) for text in args.cases]
    core = build_core(
        model, cases, eager=args.eager, step_tokens=args.step_tokens, cache=cache, fixed=args.deterministic
    )
    if args.masked:
        sampling["bad_words"] = ((0, 0, 0),)  # as with grammars, sampling waits for the token before
        rows = max(case.requests for case in cases)
        vars(core.constraints)["begin"] = HalfMasks(rows, model.config.vocab_size, core.runner.device).begin
    if args.most_repeats:
        core.max_repeats = args.most_repeats
    if args.slow_host:
        vars(core.scheduler)["expire"] = waster(args.slow_host / 1e3)
    work, rates, vocab = Work.of(model, core.runner.caches), ceilings(), model.config.vocab_size
    for case in cases:
        measure(core, case, vocab, seed=1, **sampling)
        for again in range(args.repeat):
            found = measure(core, case, vocab, seed=2 + again, **sampling)
            about = {"sampling": sampling, "masked": args.masked, "deterministic": args.deterministic}
            about |= {"slow_host_ms": args.slow_host} if args.slow_host else {}
            about |= {"most_repeats": args.most_repeats} if args.most_repeats else {}
            record(recorder, args.model, precision, found, work, rates, **about)
        if args.profile:
            title = f"{args.model} in {precision} on {device_name()}"
            page(core, found, title, Path(args.profile), work, rates, sampling, vocab)


def waster(seconds: float) -> Callable[[], list[object]]:
    """In place of Scheduler.expire: a host that is slower by so much a turn."""

    def expire() -> list[object]:
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            pass
        return []

    return expire


def page(
    core: GenerateCore,
    found: Measurement,
    title: str,
    folder: Path,
    work: Work,
    rates: tuple[float, float] | None,
    sampling: dict[str, Any],
    vocab: int,
) -> None:
    """Profile the case once more and write its page to ``folder``."""
    case = found.case
    with tempfile.TemporaryDirectory() as traces:
        profiler = WindowProfiler(core, Path(traces), limit=6, case=case)
        measure(core, case, vocab, seed=3, on_step=profiler.on_step, **sampling)
        profiler.close()
    text = summary(title, found, profiler.windows, work, rates)
    (folder / f"{title.split()[0]}-{str(case).replace('/', '-')}.txt").write_text(text)


def record(
    recorder: Recorder,
    model: str,
    precision: str,
    found: Measurement,
    work: Work,
    rates: tuple[float, float] | None,
    **about: Any,
) -> None:
    """One row: output tokens a second, or seconds where a case is a prompt alone."""
    case, facts = found.case, found.as_dict()
    least = None if rates is None else work.case_seconds(case, rates)
    tokens, single = case.requests * case.outputs, case.outputs == 1
    recorder.row(
        model=model, precision=precision, case=str(case), metric="seconds" if single else "output_tok_s",
        value=found.seconds if single else found.output_tokens_s,
        floor=None if least is None else least if single else tokens / least,
        first_token_s=round(min(found.first), 4), steps=len(found.steps), decode_step_ms=facts["decode_step_ms"],
        prefill_s=facts["prefill_seconds"], device_busy=facts["device_busy"], host_ms=facts["host_ms"], **about,
    )  # fmt: skip


if __name__ == "__main__":
    main()
