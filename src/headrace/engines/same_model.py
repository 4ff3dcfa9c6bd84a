"""Do a set-up and its reference run the same model over the same tokens? Weights alone do not tell."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

import msgspec
from torch import nn

from headrace.checkpoints.base import Checkpoint
from headrace.engines.texts import PACKAGED_TEXTS, read_rows
from headrace.errors import MissingFile
from headrace.text.tokenizer import Tokenizer

__all__ = ["unlike_reference"]

# What checkpoints of one model may say differently: sizes of tables, which are compared as weights, and limits.
_FREE = ("vocab_size", "max_position_embeddings", "max_tokens", "tied", "headless", "rope_neighbours")


def unlike_reference(
    model: nn.Module, reference: nn.Module, checkpoint: Checkpoint, base: Checkpoint
) -> tuple[str, ...]:
    """Sentences about settings and tokenizers that differ. Of folders only: a GGUF file says it in other words."""
    if not (checkpoint.path.is_dir() and base.path.is_dir()) or checkpoint.fingerprint == base.fingerprint:
        return ()
    return (*_settings(model, reference), *_tokens(checkpoint, base))


def _settings(model: nn.Module, reference: nn.Module) -> Iterator[str]:
    mine, other = (
        msgspec.to_builtins(getattr(each, "backbone", each).config, order="deterministic")
        for each in (model, reference)
    )
    for name, ours, theirs in _unlike(mine, other):
        yield (
            f"{name} is {ours!r} by its config.json, and {theirs!r} by the reference's: the same weights make other "
            "numbers"
        )


def _unlike(
    mine: Mapping[str, Any], other: Mapping[str, Any], at: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted(mine.keys() | other.keys()):
        ours, theirs = mine.get(name), other.get(name)
        if name in _FREE or ours == theirs:
            continue
        if isinstance(ours, dict) and isinstance(theirs, dict):
            yield from _unlike(ours, theirs, f"{at}{name}.")
        elif not (
            isinstance(ours, float) and isinstance(theirs, float) and math.isclose(ours, theirs, rel_tol=1e-5)
        ):
            yield at + name, ours, theirs


def _tokens(checkpoint: Checkpoint, base: Checkpoint) -> Iterator[str]:
    """The packaged texts in the tokens of both; where one has no tokenizer, nothing is said."""
    try:
        mine, other = Tokenizer.from_path(checkpoint.path), Tokenizer.from_path(base.path)
    except MissingFile:
        return
    for text in read_rows(PACKAGED_TEXTS):
        if not isinstance(text, str):
            continue
        for at, (ours, theirs) in enumerate(zip_longest(mine.encode(text), other.encode(text))):
            if ours != theirs:
                yield (
                    f"its tokenizer is not the reference's: token {at} of {text[:40]!r} is {ours}, and {theirs} there"
                )
                return
