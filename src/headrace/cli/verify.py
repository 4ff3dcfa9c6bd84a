"""Measure what a set-up (quantized weights, a smaller KV cache, another dtype) costs against the 16-bit model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.cli.flags import add_spec_flags, resolution

if TYPE_CHECKING:
    from headrace.engines.verify import Report

EXAMPLES = """\
examples:
  headrace verify smollm2-135m --quantization fp8         on the packaged texts
  headrace verify ./model --quantization fp4 --texts my.jsonl --max-kl 0.02
  headrace verify ./model-awq --reference ./model         a quantized checkpoint against its original
  headrace verify ./model --kv-cache-dtype fp8 --json     for programs

Texts: .jsonl with a column "text" or "messages"; any other file: paragraphs.
exit codes: 0 within the limits; 1 beyond them; 2 the model or an option is wrong.
"""

FLAGS = ("revision", "device", "dtype", "quantization", "kv_cache_dtype")
BEYOND = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    add = parser.add_argument
    add("model", metavar="MODEL|config.yaml", help="name, folder, .gguf file, hub id or configuration")
    add("--reference", metavar="MODEL", help="what to compare with (default: the same model, not quantized)")
    add("--texts", metavar="FILE", help="your own texts instead of the packaged ones")
    add("--max-tokens", type=int, default=512, metavar="N", help="tokens of each text (512)")
    add("--max-kl", type=float, metavar="X", help="limit of the mean KL divergence in nats (0.05)")
    add("--min-top1", type=float, metavar="X", help="least agreement on the likeliest token (0.9)")
    add(
        "--max-perplexity-ratio",
        type=float,
        metavar="X",
        help="limit of perplexity over the reference's (1.05)",
    )
    add("--json", action="store_true", help="print JSON instead of a table")
    add_spec_flags(parser, FLAGS)


def run(args: argparse.Namespace) -> int:
    """Compare and print."""
    from headrace.errors import ConfigError

    if args.max_tokens < 2:
        raise ConfigError(f"--max-tokens is {args.max_tokens}; expected at least 2", param="max_tokens")
    spec = resolution(args, FLAGS).spec
    import msgspec

    from headrace.engines.texts import PACKAGED_TEXTS, read_rows, tokenized
    from headrace.engines.verify import Limits, verify

    reference = None
    if args.reference is not None:
        reference = msgspec.structs.replace(
            spec, model=args.reference, path=None, quantization="", kv_cache_dtype="auto"
        )
    given = {name: getattr(args, name) for name in Limits.__struct_fields__}
    limits = Limits(**{name: value for name, value in given.items() if value is not None})
    rows = read_rows(Path(args.texts) if args.texts else PACKAGED_TEXTS)
    report = verify(
        spec,
        lambda checkpoint: tokenized(checkpoint, rows, args.max_tokens),
        reference=reference,
        limits=limits,
    )
    if args.json:
        print(json.dumps(msgspec.to_builtins(report) | {"passed": report.passed}, indent=1))
    else:
        _show(report)
    return 0 if report.passed else BEYOND


def _show(report: Report) -> None:
    print(f"set-up     {report.setup}")
    print(f"reference  {report.reference}")
    print(f"{report.tokens} tokens")
    print(
        f"  KL divergence   {report.mean_kl:.5f} nats (99%: {report.p99_kl:.4f}, largest {report.max_kl:.3f})"
    )
    print(f"  same top token  {report.top1:.2%}")
    ratio = report.perplexity / report.reference_perplexity
    print(
        f"  perplexity      {report.perplexity:.4f} (reference {report.reference_perplexity:.4f}, x{ratio:.4f})"
    )
    if report.layer_errors:
        last, worst = report.layer_errors[-1], max(report.layer_errors)
        print(f"  layers          relative error {worst:.3%} at most, {last:.3%} after the last")
    if report.matrices:
        by_error = max(report.matrices, key=lambda matrix: matrix.error)
        print(
            f"  matrices        {len(report.matrices)}, off by {by_error.error:.2%} at most ({by_error.name})"
        )
    for problem in report.problems:
        print(f"problem: {problem}")
    print("passed" if report.passed else "FAILED")
