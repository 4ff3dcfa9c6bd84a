"""Write a quantized copy of a model that this server and others load (compressed-tensors)."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.cli.flags import add_spec_flags, positive, resolution

if TYPE_CHECKING:
    from headrace.checkpoints.base import Checkpoint
    from headrace.config.spec import EngineSpec
    from headrace.engines.calibration import Calibration

EXAMPLES = """\
examples:
  headrace quantize ./Qwen3-8B --type fp8 --out ./Qwen3-8B-fp8
  headrace quantize ./Qwen3-8B --type fp4 --out ./Qwen3-8B-fp4 --data my.jsonl
  headrace quantize config.yaml --out ./quantized      type, data and sizes as the file says
  headrace verify ./Qwen3-8B-fp8 --reference ./Qwen3-8B

4-bit types are fitted to data, and the others with --data: rows of a .jsonl with a column "text" or "messages", or
paragraphs of any other file; without --data, sections of Python's manual. Best are 16,000 tokens or more of what the
model is for. An interrupted run goes on where it was: give the same command again.
"""

FLAGS = ("revision", "device")
_MANUAL_ROWS, _MANUAL_TOKENS = 40, 512  # some 20,000 tokens where no data is given
_ENOUGH = 10_000  # tokens; fewer fit the sample and not the model (docs/quantization.md)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL|config.yaml",
        help="folder, hub id, packaged name or .gguf, or a configuration",
    )
    add("--out", required=True, metavar="DIR", help="folder to write")
    add(
        "--type",
        dest="kind",
        metavar="NAME",
        help="fp8, fp8_kv, fp8_mlp_only, fp4, fp4_kv, fp4_mlp_only, int8, int4 ...",
    )
    add("--data", metavar="FILE|DATASET", help="calibration data: a file, or a data set of the hub")
    add("--rows", type=positive, metavar="N", help="rows used, at most (1024; of Python's manual 40)")
    add("--max-tokens", type=positive, metavar="N", help="tokens of each row (1536; of the manual 512)")
    add(
        "--static-activations",
        action="store_true",
        help="fp8 types: one calibrated scale for each layer's input, instead of a scale a token as it comes",
    )
    add("--no-calibration", action="store_true", help="round to nearest, without data")
    add_spec_flags(parser, FLAGS)


def run(args: argparse.Namespace) -> int:
    """Quantize and write."""
    from headrace.config.quantization import quantization_type
    from headrace.errors import ConfigError

    spec = resolution(args, FLAGS).spec
    name = args.kind or spec.quantization
    if not name:
        raise ConfigError("--type is missing, and no config.yaml names one; give one, such as --type fp8")
    quantization_type(name)
    if args.kind is None and spec.kv_cache_dtype == "fp8" and name in ("fp8", "nvfp4"):
        name = {"fp8": "fp8_kv", "nvfp4": "fp4_kv"}[name]
    from headrace.engines.weights import open_weights
    from headrace.quantization.containers import QuantizedCheckpoint

    checkpoint = open_weights(_plain(spec))
    _check_cache(spec, name, checkpoint.path)
    if isinstance(checkpoint, QuantizedCheckpoint) and checkpoint.modules:
        raise ConfigError(f"{spec.model} is already quantized: {checkpoint.label}; give the 16-bit weights")
    from headrace.engines.quantize import quantize_checkpoint, uses_calibration

    if args.no_calibration and (args.static_activations or args.data):
        flag = "--static-activations" if args.static_activations else "--data"
        raise ConfigError(f"{flag} needs calibration; leave --no-calibration out", param="no_calibration")
    wanted = uses_calibration(name) or args.static_activations or args.data is not None
    with _bars() as tell:
        out = quantize_checkpoint(
            checkpoint,
            name,
            Path(args.out),
            calibration=_calibration(args, spec, checkpoint, tell)
            if wanted and not args.no_calibration
            else None,
            static=args.static_activations,
            progress=tell,
        )
    print(f"wrote {out}; check it with: headrace verify {out} --reference {spec.model}")
    return 0


def _check_cache(spec: EngineSpec, name: str, path: Path) -> None:
    """What serve would refuse is not written for others to be harmed by."""
    import msgspec

    from headrace.engines.plan import cache_problem
    from headrace.errors import ConfigError

    asked = msgspec.structs.replace(spec, path=path, quantization=name, kv_cache_dtype="auto")
    if problem := cache_problem(asked):
        raise ConfigError(problem, param="type")


def _plain(spec: EngineSpec) -> EngineSpec:
    import msgspec

    return msgspec.structs.replace(spec, quantization="", kv_cache_dtype="auto")


def _calibration(
    args: argparse.Namespace, spec: EngineSpec, checkpoint: Checkpoint, tell: Callable[[str, int, int], None]
) -> Calibration:
    from headrace.engines.calibration import Calibration
    from headrace.engines.choices import choose_device

    texts = _texts(args, spec, checkpoint)
    tokens = sum(map(len, texts))
    if tokens < _ENOUGH:
        print(
            f"headrace quantize: warning: calibration has {tokens:,} tokens; fewer than {_ENOUGH:,} fit the sample, "
            "not the model: give more text, or --no-calibration",
            file=sys.stderr,
        )
    return Calibration(checkpoint, texts, choose_device(spec), tell)


def _texts(args: argparse.Namespace, spec: EngineSpec, checkpoint: Checkpoint) -> list[list[int]]:
    """Token ids of the calibration rows: --data, else a configuration's data set, else Python's manual."""
    from headrace.config.spec import Calibration
    from headrace.engines.texts import python_manual, read_dataset, read_rows, tokenized

    asked = spec.calibration
    source = args.data or (asked.dataset if asked != Calibration() else "")
    if not source:
        rows = python_manual(args.rows or _MANUAL_ROWS)
        return tokenized(checkpoint, rows, args.max_tokens or _MANUAL_TOKENS)
    limit = args.rows or asked.num_rows
    rows = (
        read_rows(Path(source), limit=limit) if Path(source).exists() else read_dataset(source, limit=limit)
    )
    return tokenized(checkpoint, rows, args.max_tokens or asked.max_tokens)


@contextlib.contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar a stage."""
    from rich.progress import Progress, TaskID

    with Progress(transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        yield tell
