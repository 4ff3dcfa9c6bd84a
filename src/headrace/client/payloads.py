"""Inputs to request bodies: splitting and encoding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from headrace.client.exceptions import InvalidArgument

__all__ = ["check_texts", "encode", "split"]

_encoder = msgspec.json.Encoder()


def check_texts(name: str, texts: Sequence[str], *, empty: str) -> list[str]:
    """A non-empty list of strings. Raises InvalidArgument when empty, TypeError for anything else."""
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Sequence):
        raise TypeError(f"argument {name!r}: expected a list of strings, not {type(texts).__name__}")
    if not texts:
        raise InvalidArgument(empty, param=name)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"argument {name!r}: item {i} is {type(text).__name__}, expected str")
    return list(texts)


def split(texts: Iterable[str], max_items: int, max_chars: int | None) -> Iterator[list[str]]:
    """Groups of at most ``max_items`` texts and ``max_chars`` characters; a longer text is alone."""
    group: list[str] = []
    chars = 0
    for text in texts:
        if group and (len(group) >= max_items or (max_chars is not None and chars + len(text) > max_chars)):
            yield group
            group, chars = [], 0
        group.append(text)
        chars += len(text)
    if group:
        yield group


def encode(payload: Any, what: str) -> bytes:
    """JSON bytes. Raises InvalidArgument with ``what`` for anything that JSON cannot hold."""
    try:
        return _encoder.encode(payload)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidArgument(f"{what} cannot be sent as JSON: {error}") from None
