"""JSON files of a checkpoint and what must be in them; whatever is not is refused by file and key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from headrace.errors import MissingFile, UnsupportedCheckpoint

__all__ = ["count", "json_list", "json_object", "object_of", "token_id"]


def json_object(file: Path, *, optional: bool = False) -> dict[str, Any]:
    """A JSON object; {} for an absent optional file."""
    if optional and not file.exists():
        return {}
    value = _read(file)
    if not isinstance(value, dict):
        raise UnsupportedCheckpoint(f"{file} holds {type(value).__name__}; expected a JSON object")
    return value


def json_list(file: Path) -> list[dict[str, Any]]:
    value = _read(file)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UnsupportedCheckpoint(f"{file} holds no list of JSON objects")
    return value


def _read(file: Path) -> Any:
    try:
        return msgspec.json.decode(file.read_bytes())
    except FileNotFoundError:
        raise MissingFile(f"{file} is missing") from None
    except msgspec.DecodeError as error:
        raise UnsupportedCheckpoint(f"{file} is no valid JSON: {error}") from None


def count(values: dict[str, Any], key: str, file: Path) -> int:
    """A positive integer that must be there."""
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedCheckpoint(f"{file} has {key} {value!r}; expected a positive integer", param=key)
    return value


def token_id(values: dict[str, Any], key: str, file: Path) -> int:
    """An integer from 0 on that must be there."""
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UnsupportedCheckpoint(f"{file} has {key} {value!r}; expected the id of a token", param=key)
    return value


def object_of(values: dict[str, Any], key: str, file: Path) -> dict[str, Any]:
    """An object; {} where it is null or absent."""
    value = values.get(key)
    if value is not None and not isinstance(value, dict):
        raise UnsupportedCheckpoint(f"{file} has {key} {value!r}; expected a JSON object", param=key)
    return value or {}
