"""Flags of one model among several: ``--NAME.max-model-len 8192`` beside ``--max-model-len``, which is for all."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from headrace.config.schema.own import OWN
from headrace.config.schema.types import Bool
from headrace.errors import ConfigError, nearest

__all__ = ["HIDDEN", "Own", "add_hidden", "gather", "names_of", "rewrite"]

HIDDEN = "--of-model"  # what dotted flags become: MODEL, field, value as text
Own = dict[str, dict[str, str | list[str]]]  # model -> field -> text
_NAMES = "served_names"


def add_hidden(parser: argparse.ArgumentParser) -> None:
    """The flag that rewrite makes."""
    parser.add_argument(HIDDEN, nargs=3, action="append", default=[], help=argparse.SUPPRESS)


def rewrite(args: Sequence[str], fields: Sequence[str]) -> list[str]:
    """Dotted flags in a form that argparse reads; everything else as it is.

    Args:
        fields: of EngineSpec, that may be set.

    Raises:
        ConfigError: an unknown flag, or one without its value.
    """
    known = {name.replace("_", "-"): name for name in fields} | {"served-model-name": _NAMES}
    found: list[str] = []
    rest = iter(args)
    for word in rest:
        if word == "--":
            return [*found, word, *rest]
        head, equals, value = word.partition("=")
        model, dot, flag = head.removeprefix("--").rpartition(".")
        if not (word.startswith("--") and dot and model):
            found.append(word)
            continue
        name = known.get(flag) or known.get(flag.removeprefix("no-"))
        if name is None:
            raise ConfigError(f"{head}: no setting {flag!r} of a model{nearest(flag, known)}")
        if isinstance(OWN.by_name[name].type, Bool):
            if equals:
                raise ConfigError(f"{head} takes no value; write --{model}.{flag} or --{model}.no-{flag}")
            value = "false" if flag not in known else "true"
        elif flag not in known:
            raise ConfigError(f"{head}: no setting {flag!r} of a model{nearest(flag, known)}")
        elif not equals:
            value = next(rest, "")
            if not value or value.startswith("--"):
                raise ConfigError(f"{head} needs a value")
        found += [HIDDEN, model, name, value]
    return found


def names_of(model: str, alias: str | None) -> set[str]:
    """How dotted flags may call a model of the command."""
    if alias is not None:
        return {alias}
    short = Path(model).name
    for ending in (".gguf", ".yaml", ".yml"):
        short = short.removesuffix(ending)
    return {model, short}


def gather(args: argparse.Namespace, known: Sequence[set[str]]) -> list[dict[str, str | list[str]]]:
    """Settings of each model of the command.

    Args:
        known: names of each model, see names_of.

    Raises:
        ConfigError: with every name that no model has, or two have.
    """
    settings: list[dict[str, str | list[str]]] = [{} for _ in known]
    problems = []
    for name, field, value in getattr(args, "of_model", None) or []:
        places = [place for place, names in enumerate(known) if name in names]
        flag = f"--{name}.{'served-model-name' if field == _NAMES else field.replace('_', '-')}"
        if len(places) != 1:
            every = sorted({min(names, key=len) for names in known})
            why = (
                "several models are called so: name them with NAME=MODEL"
                if places
                else f"no model {name!r} here"
            )
            problems.append(
                f"{flag}: {why}{'' if places else nearest(name, every)}; models: {', '.join(every)}"
            )
        elif field == _NAMES:
            listed = settings[places[0]].setdefault(field, [])
            assert isinstance(listed, list)
            listed.append(value)
        else:
            settings[places[0]][field] = value
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return settings
