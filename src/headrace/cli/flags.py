"""Flags made from the schema of EngineSpec, so that names, ranges and help stand in one place."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from typing import Any

from headrace.config.resolve import Resolution, resolve
from headrace.config.schema.fields import Field
from headrace.config.schema.own import OWN
from headrace.config.schema.types import Bool, Enum, Str
from headrace.config.yaml import scalar
from headrace.errors import ConfigError

__all__ = ["PLAN_FLAGS", "add_spec_flags", "positive", "resolution"]

_FLAG = re.compile(r"^flag: (\w+): ")
PLAN_FLAGS = (
    *(
        "revision",
        "secret_name",
        "engine",
        "device",
        "dtype",
        "quantization",
        "kv_cache_dtype",
        "max_model_len",
        "max_num_seqs",
    ),
    *("max_num_batched_tokens", "kv_cache_bytes", "memory_fraction", "block_size", "tensor_parallel_size"),
    *("eager", "pooling", "chat_template"),
)


def positive(text: str) -> int:
    """For ``type=`` of a flag that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 up")
    return int(text)


def add_spec_flags(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Add a flag for each of these fields of EngineSpec. An absent flag is None: the default stands elsewhere."""
    group = parser.add_argument_group("settings (they win over a config.yaml)")
    for name in names:
        field = OWN.by_name[name]
        flag = "--" + name.replace("_", "-")
        text = _help(field)
        if isinstance(field.type, Bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif isinstance(field.type, Enum):
            choices = [word for word in field.type.values if word]
            group.add_argument(flag, metavar="NAME", help=f"{text} ({', '.join(choices)})")
        else:
            group.add_argument(flag, metavar="TEXT" if isinstance(field.type, Str) else "N", help=text)


def resolution(
    args: argparse.Namespace,
    names: Iterable[str],
    *,
    model: str | None = None,
    own: Mapping[str, Any] | None = None,
    called: str = "",
) -> Resolution:
    """Resolve ``model`` (or ``args.model``) with the flags. Raises ConfigError with every problem.

    Args:
        own: texts of flags of this model alone, which win; ``called`` is its name in them.
    """
    settings = {name: _value(OWN.by_name[name], getattr(args, name)) for name in names}
    own = own or {}
    settings |= {name: _own_value(OWN.by_name[name], value) for name, value in own.items()}
    try:
        return resolve(args.model if model is None else model, origin="flag", **settings)
    except ConfigError as error:
        raise ConfigError(
            [_FLAG.sub(lambda found: _as_flag(found, own, called), problem) for problem in error.problems]
        ) from None


def _as_flag(found: re.Match[str], own: Mapping[str, Any], called: str) -> str:
    prefix = f"{called}." if found[1] in own else ""
    return f"--{prefix}{found[1].replace('_', '-')} "


def _value(field: Field, given: Any) -> Any:
    if given is None or isinstance(field.type, (Bool, Str, Enum)):
        return given
    return scalar(given)


def _own_value(field: Field, given: Any) -> Any:
    return (
        given == "true"
        if isinstance(field.type, Bool)
        else given
        if isinstance(given, list)
        else _value(field, given)
    )


def _help(field: Field) -> str:
    return field.doc.rstrip(".").replace("`", "").replace("%", "%%")
