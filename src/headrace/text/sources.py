"""Which files and which GGUF metadata say how a model's text works."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace.checkpoints.folder import read_json
from headrace.checkpoints.gguf_config import generation_config
from headrace.checkpoints.gguf_header import GGUFHeader, read_header
from headrace.errors import MissingFile, UnsupportedCheckpoint

__all__ = ["TextSources", "read_sources"]

_MAX_TEMPLATE = 4 << 20


@dataclass(frozen=True, slots=True)
class TextSources:
    """What was found, unchanged.

    Attributes:
        path: folder or GGUF file.
        tokenizer_file: tokenizer.json, or None when the GGUF metadata must do.
        templates: chat templates by name; the unnamed one is ``default``.
    """

    path: Path
    tokenizer_file: Path | None = None
    tokenizer_config: dict[str, Any] = field(default_factory=dict)
    special_tokens_map: dict[str, Any] = field(default_factory=dict)
    generation_config: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    templates: dict[str, str] = field(default_factory=dict)
    gguf: GGUFHeader | None = None


def read_sources(path: Path) -> TextSources:
    """Collect the text side of a checkpoint.

    A tokenizer.json beside a GGUF file is used only if it has as many tokens as the file; otherwise the
    file's own metadata is.

    Raises MissingFile when there is neither a tokenizer.json nor a GGUF file.
    """
    if path.is_dir():
        gguf_files = [] if any(path.glob("*.safetensors")) else sorted(path.glob("*.gguf"))
        if len(gguf_files) != 1:  # the same choice as checkpoints.open_checkpoint makes
            return _from_folder(path)
        path = gguf_files[0]
    header = read_header(path)
    beside = path.parent / "tokenizer.json"
    tokens = header.metadata.get("tokenizer.ggml.tokens", [])
    if beside.is_file() and _count_tokens(beside) == len(tokens):
        return _from_folder(path.parent, header)
    return TextSources(
        path, generation_config=generation_config(header), templates=_gguf_templates(header), gguf=header
    )


def _from_folder(folder: Path, header: GGUFHeader | None = None) -> TextSources:
    file = folder / "tokenizer.json"
    if not file.is_file():
        slow = [name for name in ("tokenizer.model", "vocab.txt", "vocab.json") if (folder / name).is_file()]
        has = (
            f"; {slow[0]} alone is not enough, convert it by saving the tokenizer with transformers"
            if slow
            else ""
        )
        raise MissingFile(f"there is no tokenizer.json in {folder}{has}")
    settings = _optional(folder / "tokenizer_config.json")
    generation = _optional(folder / "generation_config.json")
    templates = folder_templates(folder, settings)
    if header is not None:
        generation = generation or generation_config(header)
        templates = templates or _gguf_templates(header)
    return TextSources(
        header.path if header else folder,
        tokenizer_file=file,
        tokenizer_config=settings,
        special_tokens_map=_optional(folder / "special_tokens_map.json"),
        generation_config=generation,
        config=_optional(folder / "config.json"),
        templates=templates,
        gguf=header,
    )


def _optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _count_tokens(file: Path) -> int:
    from tokenizers import Tokenizer

    try:
        return int(Tokenizer.from_file(str(file)).get_vocab_size(with_added_tokens=True))
    except Exception as error:  # the library raises bare Exception
        raise UnsupportedCheckpoint(f"{file} cannot be read: {error}") from None


def folder_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name; a file of its own wins over tokenizer_config.json, as in transformers."""
    templates = _named(settings.get("chat_template"), folder / "tokenizer_config.json")
    if (file := folder / "chat_template.json").is_file():
        templates |= _named(read_json(file).get("chat_template"), file)
    if (file := folder / "chat_template.jinja").is_file():
        templates["default"] = _read_template(file)
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[file.stem] = _read_template(file)
    return templates


def _named(value: Any, file: Path) -> dict[str, str]:
    """A template, or a list of ``{"name": ..., "template": ...}``, or a mapping of names."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        value = {one.get("name"): one.get("template") for one in value}
    if isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, str) for k, v in value.items()):
        return dict(value)
    raise UnsupportedCheckpoint(f"{file}: chat_template is neither a text nor a list of named texts")


def _read_template(file: Path) -> str:
    if file.stat().st_size > _MAX_TEMPLATE:
        raise UnsupportedCheckpoint(f"{file} is over {_MAX_TEMPLATE >> 20} MiB, too much for a chat template")
    return file.read_text(encoding="utf-8")


def _gguf_templates(header: GGUFHeader) -> dict[str, str]:
    prefix = "tokenizer.chat_template"
    found = {
        key.removeprefix(prefix).removeprefix(".") or "default": value
        for key, value in header.metadata.items()
        if key == prefix or key.startswith(f"{prefix}.")
    }
    return {name: text for name, text in found.items() if isinstance(text, str)}
