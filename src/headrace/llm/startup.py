"""From an EngineSpec to a running core with its text side."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec

from headrace.config.spec import EngineSpec
from headrace.engines.client import EngineClient
from headrace.llm.protocols import TextKit

__all__ = ["advice", "start"]

_ADVISED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


async def start(spec: EngineSpec) -> tuple[EngineClient, TextKit, dict[str, Any]]:
    """Start the core, and read tokenizer, template and sampling advice while it loads.

    Raises what resolving, reading or loading raises; then nothing is left running.
    """
    from headrace.checkpoints.resolve import resolve
    from headrace.engines.process import start as start_core
    from headrace.llm.textkit import load_text

    if spec.path is None:
        path = await asyncio.to_thread(resolve, spec.model, spec.revision)
        spec = msgspec.structs.replace(spec, path=path)
    reading = asyncio.create_task(asyncio.to_thread(load_text, spec))
    client = await start_core(spec)
    try:
        text = await reading
    except BaseException:
        await client.close(drain=False)
        raise
    return client, text, advice(text.tokenizer.sources.generation_config)


def advice(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling parameters that a checkpoint's ``generation_config.json`` recommends."""
    found = {key: generation_config.get(key) for key in _ADVISED}
    return {
        key: value
        for key, value in found.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
