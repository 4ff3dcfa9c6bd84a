"""Flags that describe models, and the EngineSpecs that they stand for."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from headrace.config.spec import Device, DType, Engine, EngineSpec
from headrace.errors import ConfigError

__all__ = ["add_model_arguments", "api_keys", "specs"]

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_ALIAS = re.compile(r"([A-Za-z0-9_.:-]+)=(.+)")


def size(text: str) -> int:
    """Bytes from ``4G``, ``512MiB``, ``1000000``; raises ValueError, which argparse reports."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected something like 4G or 512M")
    return int(float(match[1]) * _UNITS[match[2]])


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags for what is loaded and how; they apply to every model of the command."""
    group = parser.add_argument_group("models (these apply to every model)")
    add = group.add_argument
    add("--revision", help="branch, tag or commit of a hub repository")
    add("--dtype", choices=get_args(DType), default="auto", help="of weights and activations")
    add("--quantization", default="", metavar="SCHEME", help="weight format, if not the checkpoint's own")
    add("--kv-cache-dtype", default="auto", metavar="DTYPE", help="of the KV cache (default: as --dtype)")
    add("--device", choices=get_args(Device), default="auto")
    add(
        "--engine", choices=get_args(Engine), default="auto", help="which engine (default: by the checkpoint)"
    )
    add("--max-model-len", type=int, metavar="N", help="tokens of prompt and output together")
    add("--max-num-seqs", type=int, metavar="N", help="sequences in one step (default 256)")
    add("--max-num-batched-tokens", type=int, metavar="N", help="tokens in one step")
    add("--max-queue", type=int, metavar="N", help="requests that may wait before new ones get 429 (2048)")
    add("--kv-cache-bytes", type=size, metavar="SIZE", help="size of the KV pool, such as 4G")
    add("--memory-fraction", type=float, metavar="F", help="of free memory that may be used (default 0.9)")
    add("--no-prefix-caching", action="store_true", help="compute every prompt anew")
    add("--tensor-parallel-size", type=int, metavar="N", help="GPUs that share one model")
    add("--threads", type=int, metavar="N", help="CPU threads of each engine")
    add("--chat-template", metavar="FILE", help="jinja2 template instead of the checkpoint's own")
    add("--deterministic", action="store_true", help="a row's result does not depend on its batch")
    add("--eager", action="store_true", help="no CUDA graphs")


_FLAGS = {
    "revision": "revision",
    "dtype": "dtype",
    "quantization": "quantization",
    "kv_cache_dtype": "kv_cache_dtype",
    "device": "device",
    "engine": "engine",
    "max_model_len": "max_model_len",
    "max_num_seqs": "max_num_seqs",
    "max_num_batched_tokens": "max_num_batched_tokens",
    "max_queue": "max_queue",
    "kv_cache_bytes": "kv_cache_bytes",
    "memory_fraction": "memory_fraction",
    "tensor_parallel_size": "tensor_parallel_size",
    "threads": "num_threads",
    "chat_template": "chat_template",
    "deterministic": "deterministic",
    "eager": "eager",
}
_POSITIVE = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size", "threads")


def specs(args: argparse.Namespace, models: Sequence[str]) -> list[EngineSpec]:
    """One EngineSpec a model. Raises ConfigError naming the flag."""
    for flag in _POSITIVE:
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} is {value}; expected at least 1", param=flag)
    if args.memory_fraction is not None and not 0 < args.memory_fraction <= 1:
        raise ConfigError(f"--memory-fraction is {args.memory_fraction}; expected a number in (0, 1]")
    fields = {field: value for flag, field in _FLAGS.items() if (value := getattr(args, flag)) is not None}
    fields["prefix_caching"] = not args.no_prefix_caching
    names = getattr(args, "served_model_name", None) or []
    if names and len(models) > 1:
        raise ConfigError("--served-model-name is for one model; with several write NAME=MODEL for each")
    return [_spec(model, names, fields) for model in models]


def _spec(model: str, names: Sequence[str], fields: dict[str, object]) -> EngineSpec:
    alias = None if Path(model).exists() else _ALIAS.fullmatch(model)
    if alias is not None:
        names, model = [*names, alias[1]], alias[2]
    if not names and Path(model).exists():  # a path is no name to ask clients for
        names = [Path(model).absolute().name.removesuffix(".gguf")]
    return EngineSpec(model=model, served_names=tuple(names), **fields)  # type: ignore[arg-type]


def api_keys(args: argparse.Namespace) -> tuple[str, ...]:
    """Keys from --api-key, --api-key-file and HEADRACE_API_KEYS. Raises ConfigError."""
    from headrace.config import env

    keys = [*args.api_key, *env.api_keys()]
    for name in args.api_key_file:
        try:
            lines = Path(name).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-key-file {name} cannot be read: {error}") from error
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:  # an empty file must not open the server to everybody
            raise ConfigError(f"--api-key-file {name} holds no key; write one a line")
        keys += found
    if any(not key.strip() for key in keys):
        raise ConfigError("--api-key is empty; give a key, or leave the flag out to serve without keys")
    return tuple(dict.fromkeys(keys))
