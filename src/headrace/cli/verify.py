"""Measure what a set-up (quantized weights, a smaller KV cache, another dtype) costs against the 16-bit model.

Generating models by their next-token distributions, embedders by the cosine of their vectors, classifiers and
rerankers by their probabilities.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.cli.flags import add_spec_flags, resolution

if TYPE_CHECKING:
    from headrace.config.spec import EngineSpec
    from headrace.engines.texts import Row
    from headrace.engines.verify import Report
    from headrace.engines.verify_encode import EncodeReport

EXAMPLES = """\
examples:
  headrace verify smollm2-135m --quantization fp8         on the packaged texts
  headrace verify ./model --quantization fp4 --texts my.jsonl --max-kl 0.02
  headrace verify ./model-awq --reference ./model         a quantized checkpoint against its original
  headrace verify ./model --kv-cache-dtype fp8 --json     for programs
  headrace verify minilm --quantization fp8 --min-cosine 0.999

Texts: .jsonl with a column "text" or "messages"; any other file: paragraphs.
exit codes: 0 within the limits; 1 beyond them; 2 the model or an option is wrong.
"""

FLAGS = ("revision", "device", "dtype", "quantization", "kv_cache_dtype", "pooling")
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
    add("--min-cosine", type=float, metavar="X", help="embedders: least cosine of a vector (0.999)")
    add(
        "--max-difference",
        type=float,
        metavar="X",
        help="classifiers and rerankers: limit of a probability's change (0.02)",
    )
    add("--floor", action="store_true", help="measure bfloat16 without any quantization, too (on CPUs)")
    add("--json", action="store_true", help="print JSON instead of a table")
    add_spec_flags(parser, FLAGS)


def run(args: argparse.Namespace) -> int:
    """Compare and print."""
    from headrace.engines.kernel_cache import keep_kernels
    from headrace.errors import ConfigError

    keep_kernels()
    if args.max_tokens < 2:
        raise ConfigError(f"--max-tokens is {args.max_tokens}; expected at least 2", param="max_tokens")
    spec = resolution(args, FLAGS).spec
    import msgspec

    from headrace.engines.texts import PACKAGED_TEXTS, read_rows

    reference = None
    if args.reference is not None:
        reference = msgspec.structs.replace(
            spec, model=args.reference, path=None, quantization="", kv_cache_dtype="auto"
        )
    rows = read_rows(Path(args.texts) if args.texts else PACKAGED_TEXTS)
    compare = _encoder if _encodes(spec) else _decoder
    report = compare(spec, reference, rows, args)
    if args.json:
        print(json.dumps(msgspec.to_builtins(report) | {"passed": report.passed}, indent=1))
    else:
        _show(report)
    return 0 if report.passed else BEYOND


def _encodes(spec: EngineSpec) -> bool:
    from headrace.engines.inspect import inspect
    from headrace.engines.select import select
    from headrace.engines.weights import open_weights

    return select(inspect(open_weights(spec).path), spec).engine in ("bert", "embed")


def _decoder(
    spec: EngineSpec, reference: EngineSpec | None, rows: Sequence[Row], args: argparse.Namespace
) -> Report:
    from headrace.engines.texts import tokenized
    from headrace.engines.verify import Limits, verify

    return verify(
        spec,
        lambda checkpoint: tokenized(checkpoint, rows, args.max_tokens),
        reference=reference,
        limits=Limits(**_given(args, Limits.__struct_fields__)),
        floor=args.floor,
    )


def _encoder(
    spec: EngineSpec, reference: EngineSpec | None, rows: Sequence[Row], args: argparse.Namespace
) -> EncodeReport:
    from headrace.engines.verify_encode import EncodeLimits, verify_encode
    from headrace.errors import ConfigError

    if spec.kv_cache_dtype != "auto":
        raise ConfigError(
            f"kv_cache_dtype is {spec.kv_cache_dtype!r}, and this model keeps no cache",
            param="kv_cache_dtype",
        )
    if args.floor:
        raise ConfigError(
            "--floor is for generating models; compare an embedder with --dtype bfloat16", param="floor"
        )
    limits = EncodeLimits(**_given(args, EncodeLimits.__struct_fields__))
    return verify_encode(spec, rows, args.max_tokens, reference=reference, limits=limits)


def _given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, float]:
    """Limits that the command line sets."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _show(report: Report | EncodeReport) -> None:
    from headrace.engines.verify import Report

    print(f"set-up     {report.setup}")
    print(f"reference  {report.reference}")
    if isinstance(report, Report):
        _show_tokens(report)
    else:
        _show_changes(report)
    if report.layer_errors:
        last, worst = report.layer_errors[-1], max(report.layer_errors)
        print(f"  layers          relative error {worst:.3%} at most, {last:.3%} after the last")
    if report.matrices:
        by_error = max(report.matrices, key=lambda matrix: matrix.error)
        print(
            f"  matrices        {len(report.matrices)}, off by {by_error.error:.2%} at most ({by_error.name})"
        )
    for note in report.notes:
        print(f"note: {note}")
    for problem in report.problems:
        print(f"problem: {problem}")
    print("passed" if report.passed else "FAILED")


def _show_tokens(report: Report) -> None:
    print(f"{report.tokens} tokens")
    print(
        f"  KL divergence   {report.mean_kl:.5f} nats (99%: {report.p99_kl:.4f}, largest {report.max_kl:.3f})"
    )
    print(
        f"  same top token  {report.top1:.2%} (of the {report.decided:.0%} that are no near tie: "
        f"{report.top1_decided:.2%})"
    )
    ratio = report.perplexity / report.reference_perplexity
    print(
        f"  perplexity      {report.perplexity:.4f} (reference {report.reference_perplexity:.4f}, x{ratio:.4f})"
    )
    if report.floor is not None:
        kl, top1, decided = report.floor
        print(f"  bfloat16 alone  {kl:.5f} nats, same top token {top1:.2%} (no near tie: {decided:.2%})")


def _show_changes(report: EncodeReport) -> None:
    print(f"{report.inputs} inputs, {report.tokens} tokens")
    for change in report.changes:
        if change.min_cosine is not None:
            print(
                f"  {change.task:<15} cosine {change.min_cosine:.5f} at least, {change.mean_cosine:.5f} on average "
                f"({change.results} vectors)"
            )
        else:
            same = "" if change.same_label is None else f", the same label for {change.same_label:.2%}"
            print(f"  {change.task:<15} probabilities off by {change.max_difference:.4f} at most{same}")
