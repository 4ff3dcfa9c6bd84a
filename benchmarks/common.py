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

__all__ = ["CEILINGS", "SHAPES", "Recorder", "ceilings", "model_config"]

RESULTS = Path(__file__).parent / "results"

_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
}
_BERT = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}
# config.json of the models that are measured, as far as it matters.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        **_QWEN3,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "qwen3-1.7b": {
        **_QWEN3,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        **_QWEN3,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "qwen3-embedding-0.6b": {
        **_QWEN3,
        "architectures": ["Qwen3Model"],
        "vocab_size": 151669,
        "max_position_embeddings": 32768,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "bge-large": {
        **_BERT,
        "vocab_size": 30522,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "tiny-bert": {
        **_BERT,
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "tiny": {
        **_QWEN3,
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
    },
}
# Bytes/s (read plus written) and bf16 FLOP/s seen on the device: a device-to-device copy and an 8192-cubed product.
CEILINGS = {"NVIDIA H200": (4.28e12, 788e12), "NVIDIA H100 80GB HBM3": (3.0e12, 798e12)}


def model_config(name: str) -> dict[str, Any]:
    """config.json of a measured shape."""
    return SHAPES[name]


def ceilings() -> tuple[float, float] | None:
    """(bytes/s, bf16 FLOP/s) of this device, or None for one that was not measured."""
    return CEILINGS.get(device_name())


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


class Recorder:
    """Prints rows, and with --record appends them to benchmarks/results/<bench>.jsonl."""

    def __init__(self, bench: str, args: argparse.Namespace) -> None:
        self.bench = bench
        self.keep = bool(getattr(args, "record", False))
        self.path = Path(getattr(args, "results", None) or RESULTS) / f"{bench}.jsonl"
        self.common = {
            "device": device_name(),
            "commit": getattr(args, "commit", None) or _commit(),
            "date": datetime.date.today().isoformat(),
            "command": "python -m benchmarks." + shlex.join([bench, *sys.argv[1:]]),
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
