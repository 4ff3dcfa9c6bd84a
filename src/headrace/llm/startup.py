"""From an EngineSpec to a running core with its text side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.config.spec import EngineSpec
from headrace.engines.client import EngineClient
from headrace.llm.protocols import TextKit

__all__ = ["generation_defaults", "start"]

_ADVISED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


async def start(spec: EngineSpec) -> tuple[EngineClient, TextKit, Mapping[str, Any]]:
    """Start the core and read tokenizer, template and sampling advice beside it."""
    from headrace.engines.process import start as start_core
    from headrace.llm.textkit import load_text

    client = await start_core(spec)
    return client, load_text(client.spec), generation_defaults(client.spec.path)


def generation_defaults(path: Path | None) -> dict[str, Any]:
    """The sampling parameters that a checkpoint's ``generation_config.json`` advises; {} without one."""
    file = path / "generation_config.json" if path is not None and path.is_dir() else None
    if file is None or not file.is_file():
        return {}
    advice = json.loads(file.read_text(encoding="utf-8"))
    return {key: advice[key] for key in _ADVISED if isinstance(advice.get(key), (int, float))}
