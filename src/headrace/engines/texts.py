"""Texts to calibrate with and to compare on: the packaged set, or rows of a user's file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from headrace.checkpoints.base import Checkpoint
from headrace.errors import ConfigError, MissingFile
from headrace.text.template import ChatTemplate
from headrace.text.tokenizer import Tokenizer

__all__ = ["PACKAGED_TEXTS", "Row", "python_manual", "read_dataset", "read_rows", "tokenized"]

PACKAGED_TEXTS = Path(__file__).parent.parent / "quantization" / "texts.jsonl"

Row = str | list[dict[str, Any]]
"""A text, or the messages of a chat."""


def read_rows(file: Path, *, limit: int | None = None) -> list[Row]:
    """Rows of a file.

    Args:
        file: ``.jsonl`` (or ``.json``, a list) with a column ``text``, or ``messages`` as a chat API takes them;
            any other file is one text a paragraph, paragraphs apart by empty lines.
        limit: of the number of rows.

    Raises MissingFile, or ConfigError naming the line.
    """
    try:
        content = file.read_text("utf-8-sig")
    except FileNotFoundError:
        raise MissingFile(f"there is no file {file}") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}; give a file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is no UTF-8 text: {error}") from None
    found: list[Row] = []
    for row in _rows(file, content):
        if not isinstance(row, str) or row.strip():
            found.append(row)
        if limit is not None and len(found) == limit:
            break
    if not found:
        raise ConfigError(f"{file} holds no text")
    return found


def _rows(file: Path, content: str) -> Iterator[Row]:
    if file.suffix not in (".jsonl", ".json"):
        yield from content.split("\n\n")
        return
    lines = content.split("\n")  # others that end lines for people may stand within a string
    if file.suffix == ".json":
        rows = _json(content, f"{file}")
        if not isinstance(rows, list):
            raise ConfigError(f"{file} holds a JSON {type(rows).__name__}; expected a list of rows")
        lines = [json.dumps(row) for row in rows]
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _row(_json(line, f"{file}, line {number}"), f"{file}, line {number}")


def _json(text: str, where: str) -> Any:
    try:
        found = json.loads(text)
        if "\\u" in text:
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where} holds half of a character (a lone surrogate): {error}") from None
    except ValueError as error:
        raise ConfigError(f"{where} is no JSON: {error}") from None


def _row(row: Any, where: str) -> Row:
    if isinstance(row, dict):
        if isinstance(row.get("text"), str):
            return str(row["text"])
        messages = row.get("messages")
        if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
            return messages
    raise ConfigError(f"{where} has neither 'text' (a string) nor 'messages' (a list of objects)")


def python_manual(limit: int) -> list[Row]:
    """Sections of Python's manual, which every Python has: prose and code to calibrate with, the longest first."""
    from pydoc_data.topics import topics

    longest: list[Row] = [*sorted(topics.values(), key=len, reverse=True)[:limit]]
    return longest


def read_dataset(name: str, *, limit: int) -> list[Row]:
    """Rows of the ``train`` split of a data set of the hub (column ``text`` or ``messages``).

    Raises ConfigError when the package ``datasets`` is missing, or the data set cannot be read.
    """
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise ConfigError(
            f"calibration data {name!r} is no file here, and reading a data set of the hub needs the package "
            "datasets (pip install datasets); or give a .jsonl file with --data",
            param="calibration",
        ) from None
    try:
        rows = load_dataset(name, split="train", streaming=True)
        found = [_row(row, f"{name}, row {number}") for number, row in zip(range(limit), rows)]
    except (OSError, ValueError) as error:
        raise ConfigError(f"the data set {name!r} cannot be read: {error}", param="calibration") from None
    if not found:
        raise ConfigError(f"the data set {name!r} has no rows", param="calibration")
    return found


def tokenized(checkpoint: Checkpoint, rows: Sequence[Row], max_tokens: int) -> list[list[int]]:
    """Token ids of each row as requests would have them (chats by the model's template), cut to ``max_tokens``."""
    tokenizer = Tokenizer.from_path(checkpoint.path)
    template: ChatTemplate | None = None
    found = []
    for row in rows:
        if isinstance(row, str):
            found.append(tokenizer.encode(row)[:max_tokens])
            continue
        if template is None:
            template = ChatTemplate.from_sources(tokenizer.sources, tokenizer.special_tokens)
        text = template.render(row, add_generation_prompt=False)
        found.append(tokenizer.encode(text, add_special_tokens=False)[:max_tokens])
    return found
