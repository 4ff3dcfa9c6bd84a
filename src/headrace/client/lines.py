"""Lines of files that people's tools have written."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator

__all__ = ["full_lines"]


def full_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of those that hold more than blanks, without a byte order mark."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield number, line
