"""From what the user wrote to files on this machine."""

from __future__ import annotations

from pathlib import Path

from headrace.checkpoints.base import Checkpoint
from headrace.checkpoints.fetch import fetch
from headrace.checkpoints.gguf_header import is_gguf
from headrace.checkpoints.hub import TOKEN_SECRET, is_hub_id, snapshot
from headrace.checkpoints.packaged import PACKAGED
from headrace.errors import MissingFile, UnsupportedCheckpoint, nearest

__all__ = ["open_checkpoint", "resolve"]


def resolve(model: str, revision: str | None = None, secret: str = TOKEN_SECRET) -> Path:
    """Where a model's files lie, fetched first if need be.

    Args:
        model: a packaged name, a folder, a .gguf file or a hub id, tried in this order.
        revision: branch, tag or commit of a hub repository; refused for anything else.
        secret: name of the secret with the hub's token.

    Returns: a folder or a .gguf file. Raises MissingFile with near matches when it is none of these.
    """
    if not model.strip():
        raise MissingFile("the model is empty; give a packaged name, a folder, a .gguf file or a hub id")
    path = Path(model).expanduser()
    if model in PACKAGED or path.exists():
        if revision is not None:
            raise MissingFile(f"revision {revision!r} only makes sense for hub ids, and {model!r} is none")
        return fetch(model) if model in PACKAGED else _existing(path)
    looks_like_path = model.startswith(("/", "./", "../", "~")) or path.suffix == ".gguf"
    if is_hub_id(model) and not looks_like_path:
        return snapshot(model, revision, secret)
    raise MissingFile(f"there is no model {model!r}{_hint(model, path)}")


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a folder or a GGUF file, reading headers only.

    A folder without safetensors that holds exactly one .gguf file stands for that file.
    """
    if path.is_file():
        return _open_gguf(path)
    if not path.is_dir():
        raise MissingFile(f"there is no folder or file {path}{_hint(path.name, path)}")
    files = [] if any(path.glob("*.safetensors")) else sorted(path.glob("*.gguf"))
    if len(files) > 1:
        listed = ", ".join(file.name for file in files[:8])
        raise MissingFile(f"{path} holds {len(files)} GGUF files; name one of them: {listed}")
    if files:
        return _open_gguf(files[0])
    from headrace.checkpoints.folder import FolderCheckpoint

    return FolderCheckpoint(path)


def _open_gguf(path: Path) -> Checkpoint:
    from headrace.checkpoints.gguf import GGUFCheckpoint

    return GGUFCheckpoint(path)


def _existing(path: Path) -> Path:
    if path.is_file() and not is_gguf(path):
        raise UnsupportedCheckpoint(
            f"{path} is no GGUF file; for safetensors give the folder that holds it and config.json"
        )
    return path.absolute()


def _hint(model: str, path: Path) -> str:
    """Near names among packaged models and beside the path, and what is possible at all."""
    offered = [packaged.name for packaged in PACKAGED.values() if not packaged.test_only]
    parent = path.parent
    beside = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    close = nearest(path.name, beside) or nearest(model, offered)
    if close:
        return close
    if not parent.is_dir():
        return f"; the folder {parent} does not exist either"
    return f"; give a folder, a .gguf file, a hub id (owner/name) or one of {', '.join(offered)}"
