"""Measure generation through the real core: rate, latency, and with --profile where the time goes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.cli.flags import PLAN_FLAGS, add_spec_flags, resolution

if TYPE_CHECKING:
    from headrace.engines.bench.run import Bench, Result

EXAMPLES = """\
examples:
  headrace bench smollm2-135m                              one request of 128 tokens in, 64 out
  headrace bench ./Qwen3-8B --cases 1x128/256 64x512/128   requests x tokens in / tokens out
  headrace bench --random qwen3-8b --cases 16x128/256      random weights made on the device, no download
  headrace bench ./Qwen3-8B --concurrency 64 --prompt 512 --output 128 --profile trace

--profile DIR writes DIR/CASE/: prefill.trace.json and decode.trace.json (open them at ui.perfetto.dev or
chrome://tracing) and summary.txt: busy share of the device, kernels, host time, bytes against the floor.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    add = parser.add_argument
    add(
        "model",
        nargs="?",
        metavar="MODEL|config.yaml",
        help="name, folder, .gguf file, hub id or configuration",
    )
    add(
        "--random",
        metavar="SHAPE",
        help="instead of MODEL: a known shape, or a config.json; weights are random",
    )
    add(
        "--cases",
        nargs="+",
        metavar="NxIN/OUT",
        help="several cases, each run once before to warm up",
    )
    add(
        "--concurrency",
        type=int,
        default=1,
        metavar="N",
        help="requests at once, where --cases is not given (1)",
    )
    add("--prompt", type=int, default=128, metavar="N", help="tokens in (128)")
    add("--output", type=int, default=64, metavar="N", help="tokens out (64)")
    add("--temperature", type=float, default=0.0, metavar="X", help="of sampling (0: greedy)")
    add("--seed", type=int, default=0, metavar="N", help="of prompts")
    add("--profile", metavar="DIR", help="profile each case once more and write what was seen there")
    add("--profile-steps", type=int, default=16, metavar="N", help="steps of each profile, at most (16)")
    add("--json", action="store_true", help="print one JSON object a case and no table")
    add_spec_flags(parser, PLAN_FLAGS)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    from headrace.engines.bench.cases import Case, parse_case
    from headrace.engines.kernel_cache import keep_kernels

    keep_kernels()
    if args.cases:
        cases = [parse_case(text) for text in args.cases]
    else:
        cases = [parse_case(f"{args.concurrency}x{args.prompt}/{args.output}")]
    bench = _bench(args, cases)
    results = []
    for case in cases:
        folder = None
        if args.profile:
            folder = Path(args.profile) / str(Case(*case)).replace("/", "-")
        results.append(
            bench.run(
                case, seed=args.seed, temperature=args.temperature, folder=folder, limit=args.profile_steps
            )
        )
        if args.json:
            print(json.dumps(results[-1].as_dict()), flush=True)
    if not args.json:
        _show(bench, results)
    bench.close()
    return 0


def _bench(args: argparse.Namespace, cases: list[Any]) -> Bench:
    from headrace.errors import ConfigError

    if (args.model is None) == (args.random is None):
        raise ConfigError("give either MODEL or --random SHAPE", param="model")
    spec = resolution(args, PLAN_FLAGS, model=args.model or "random").spec
    import msgspec

    from headrace.engines.bench.run import Bench

    most = max(case.requests for case in cases)
    if args.max_num_seqs is None and most > spec.max_num_seqs:
        spec = msgspec.structs.replace(spec, max_num_seqs=most)
    return Bench.random(spec, args.random, cases) if args.random else Bench.load(spec, cases)


def _show(bench: Bench, results: list[Result]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    console.print(bench.title, markup=False, soft_wrap=True)
    table = Table(
        "case", "output tok/s", "of floor", "first token ms", "between tokens ms", "decode step ms", "busy", "host ms",
        box=None, header_style="bold", padding=(0, 2),
    )  # fmt: skip
    for result in results:
        found = result.as_dict()
        table.add_row(
            found["case"],
            f"{found['output_tok_s']:,.0f}",
            f"{found['floor_share']:.0%}" if found["floor_share"] else "-",
            _pair(found["first_token_ms"]),
            _pair(found["between_tokens_ms"]),
            f"{found['decode_step_ms']:.2f}" if found["decode_step_ms"] else "-",
            f"{found['device_busy']['decode']:.1%}" if found["device_busy"]["decode"] else "-",
            f"{found['host_ms']['total']:.2f}",
        )
    console.print(table)
    console.print(
        "  pairs are the median and the 99th percentile; busy: the device, in steps that only decode"
    )
    for result in results:
        if result.page:
            console.print(f"\n{result.page}", markup=False, soft_wrap=True)
        for path in result.files:
            console.print(f"wrote {path}", markup=False, soft_wrap=True)


def _pair(spread: dict[str, float] | None) -> str:
    return "-" if spread is None else f"{spread['p50']:.2f}, {spread['p99']:.2f}"
