"""Arguments of commands that start models, and the EngineSpecs that they stand for."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.cli.flags import PLAN_FLAGS, add_spec_flags, resolution
from headrace.cli.per_model import gather, names_of
from headrace.config.secrets import find_secret, missing_secrets
from headrace.config.spec import EngineSpec
from headrace.config.support import gaps
from headrace.errors import ConfigError

__all__ = ["SERVE_FLAGS", "add_model_arguments", "api_keys", "specs"]

SERVE_FLAGS = (
    *PLAN_FLAGS,
    *("prefix_caching", "max_queue", "num_threads", "overlap", "deterministic"),
    *("auto_truncate", "default_route"),
    *("tool_call_parser", "reasoning_parser"),
)
API_KEY_SECRET = "headrace_api_key"  # one key, or several apart by white space
_ALIAS = re.compile(r"([A-Za-z0-9_.:-]+)=(.+)")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags for what is loaded and how; they apply to every model of the command."""
    add_spec_flags(parser, SERVE_FLAGS)


def specs(args: argparse.Namespace, models: Sequence[str]) -> list[EngineSpec]:
    """One EngineSpec a model or config.yaml. Raises ConfigError with every problem."""
    names = getattr(args, "served_model_name", None) or []
    if names and len(models) > 1:
        raise ConfigError(
            "--served-model-name is for one model; with several write NAME=MODEL, or --NAME.served-model-name"
        )
    named = [_alias(model) for model in models]
    known = [names_of(model, alias) for alias, model in named]
    found, problems = [], []
    for (alias, model), settings in zip(named, gather(args, known)):
        try:
            found.append(_spec(args, alias, model, names, settings))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))  # a wrong flag for all is told once
    return found


def _alias(model: str) -> tuple[str | None, str]:
    """(NAME, MODEL) of ``NAME=MODEL``."""
    found = None if Path(model).exists() else _ALIAS.fullmatch(model)
    return (None, model) if found is None else (found[1], found[2])


def _spec(
    args: argparse.Namespace, alias: str | None, model: str, names: Sequence[str], own: Mapping[str, Any]
) -> EngineSpec:
    names = [*names, *own.get("served_names", ()), *([] if alias is None else [alias])]
    settings = {name: value for name, value in own.items() if name != "served_names"}
    called = alias or min(names_of(model, alias), key=len)
    found = resolution(args, SERVE_FLAGS, model=model, own=settings, called=called)
    spec = found.spec
    refused = [
        (found.origins.get(gap.field, ""), f"{text}; {gap.way}") for gap, text in gaps(spec) if gap.blocks
    ]
    if refused:  # before anything is fetched
        raise ConfigError([f"{origin if '(' in origin else model}: {text}" for origin, text in refused])
    if found.accelerator and spec.device != "cpu" and shutil.which("nvidia-smi") is None:
        print(
            f"headrace: warning: resources.accelerator: is {found.accelerator}, and no NVIDIA driver is here: "
            "this machine's CPU serves",
            file=sys.stderr,
        )
    for notice in found.report.notices:
        print(f"headrace: {notice.kind}: {notice}", file=sys.stderr)
    for name in missing_secrets(spec.secrets):
        print(
            f"headrace: warning: secrets.{name}: is listed, and no variable or file has it", file=sys.stderr
        )
    if not names and not spec.served_names and Path(spec.model).exists():  # a path is no name to ask for
        names = [Path(spec.model).absolute().name.removesuffix(".gguf")]
    if names:
        import msgspec

        spec = msgspec.structs.replace(spec, served_names=tuple(names))
    return spec


def api_keys(args: argparse.Namespace) -> tuple[str, ...]:
    """Keys from --api-key, --api-key-file, HEADRACE_API_KEYS and the secret headrace_api_key. Raises ConfigError."""
    from headrace.config import env

    secret = find_secret(API_KEY_SECRET)
    if secret is not None and not secret.reveal().strip():
        raise ConfigError(
            f"the secret {API_KEY_SECRET} ({secret.origin}) holds no key; write one, or remove it"
        )
    keys = [*args.api_key, *env.api_keys(), *(secret.reveal().split() if secret else ())]
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
