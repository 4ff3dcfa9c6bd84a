"""Shapes, random models and records shared by the benchmarks."""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from headrace.config.shapes import SHAPES

__all__ = ["SHAPES", "Recorder", "arguments", "ceilings", "device_name", "model_config"]

RESULTS = Path(__file__).parent / "results"


def model_config(name: str) -> dict[str, Any]:
    """config.json of a measured shape."""
    return SHAPES[name]


def ceilings() -> tuple[float, float] | None:
    """(bytes/s, bf16 FLOP/s) of this device, or None for one that was not measured."""
    from headrace.engines.bench import floors  # imports torch, which light benchmarks do without

    return floors.ceilings()


def device_name() -> str:
    """As torch calls it, or cpu."""
    from headrace.engines.bench import floors

    return floors.device_name()


def _command(bench: str) -> str:
    """What was run, without where this machine keeps its files."""
    words, given = [], iter(sys.argv[1:])
    for word in given:
        if word in ("--results", "--commit", "--folder"):
            next(given, None)
        else:
            words.append(Path(word).name if word.startswith("/") else word)
    module = Path(sys.argv[0]).stem if sys.argv[0].endswith(".py") else bench
    return "python -m benchmarks." + shlex.join([module, *words])


class Recorder:
    """Prints rows, and with --record appends them to benchmarks/results/<bench>.jsonl.

    Args:
        device: its name; None: ask torch, which makes this process a user of the GPU.
    """

    def __init__(self, bench: str, args: argparse.Namespace, device: str | None = None) -> None:
        self.bench = bench
        self.keep = bool(getattr(args, "record", False))
        self.path = Path(getattr(args, "results", None) or RESULTS) / f"{bench}.jsonl"
        self.common = {
            "device": device_name() if device is None else device,
            "commit": getattr(args, "commit", None) or _commit(),
            "date": datetime.date.today().isoformat(),
            "command": _command(bench),
        }

    def row(
        self,
        *,
        model: str,
        precision: str,
        case: str,
        metric: str,
        value: float,
        floor: float | None = None,
        **more: Any,
    ) -> None:
        """One measurement. ``floor``: what the hardware allows, in the same unit."""
        row = {
            "bench": self.bench, "model": model, "precision": precision, "case": case, "metric": metric,
            "value": _short(value), "floor": None if floor is None else _short(floor), **more, **self.common,
        }  # fmt: skip
        print(json.dumps({k: v for k, v in row.items() if k not in self.common}), flush=True)
        if self.keep:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    parser.add_argument("--results", help="another folder for --record")
    parser.add_argument("--commit", help="recorded where the checkout has no git")
    return parser


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"
