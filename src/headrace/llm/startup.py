"""From an EngineSpec to a running core with its text side."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from headrace.config.spec import EngineSpec
from headrace.engines.child import CoreChild
from headrace.engines.client import EngineClient
from headrace.llm.protocols import TextKit
from headrace.models.encode_card import read_encode_card
from headrace.text.encoding import EncodeText
from headrace.text.rerank import RerankTemplate, rerank_template
from headrace.text.template import load_template_text
from headrace.text.tokenizer import Tokenizer
from headrace.types import EncodeTask

if TYPE_CHECKING:
    from headrace.engines.attached import Attachment

__all__ = ["advice", "attach", "encode_side", "start"]

_ADVISED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


async def start(
    spec: EngineSpec,
    on_loading: Callable[[int, int, str], None] | None = None,
    child: CoreChild | None = None,
) -> tuple[EngineClient, TextKit, dict[str, Any]]:
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
    try:
        client = await start_core(spec, on_loading, child)
    except BaseException:
        await asyncio.gather(
            reading, return_exceptions=True
        )  # the core's error says why; nobody asks for this one
        raise
    try:
        text = await reading
    except BaseException:
        await client.close(drain=False)
        raise
    return client, text, advice(text.tokenizer.sources.generation_config)


async def attach(attachment: Attachment) -> tuple[EngineClient, TextKit, dict[str, Any]]:
    """A client of a core that runs already, and the same text side. Raises what reading a tokenizer raises."""
    from headrace.engines.attached import AttachedClient
    from headrace.llm.textkit import load_text

    text = await asyncio.to_thread(load_text, attachment.spec)
    client = await AttachedClient.attach(attachment)
    return client, text, advice(text.tokenizer.sources.generation_config)


def advice(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling parameters that a checkpoint's ``generation_config.json`` recommends."""
    found = {key: generation_config.get(key) for key in _ADVISED}
    return {
        key: value
        for key, value in found.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def encode_side(client: EngineClient, text: TextKit) -> tuple[EncodeText | None, RerankTemplate | None]:
    """How an embedder, classifier or reranker reads texts; (None, None) for a model that generates.

    Raises MissingFile, UnsupportedCheckpoint and InvalidRequest (a template that does not parse).
    """
    spec, path = client.spec, client.spec.path
    if client.ready.engine not in ("bert", "embed") or path is None:
        return None, None
    card = read_encode_card(path, pooling=spec.pooling)
    tokenizer = text.tokenizer
    assert isinstance(tokenizer, Tokenizer)
    config = tokenizer.sources.config
    names = (spec.model, path.name, str(config.get("_name_or_path", "")))
    given = None if spec.chat_template is None else load_template_text(spec.chat_template)
    template = None
    if EncodeTask.SCORE in card.tasks and client.ready.engine == "embed":
        template = rerank_template(str(config.get("model_type")), names, given)
    return EncodeText(tokenizer, card, client.ready.max_model_len), template
