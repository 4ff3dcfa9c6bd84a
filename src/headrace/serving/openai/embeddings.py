"""POST /v1/embeddings"""

from __future__ import annotations

import base64
from typing import Any

import msgspec
from aiohttp import web

from headrace.serving.body import read
from headrace.serving.call import open_call
from headrace.serving.openai.completions import inputs_of
from headrace.serving.openai.schemas import EmbeddingRequest
from headrace.serving.state import STATE
from headrace.serving.tei.common import check_count, direction, only_model
from headrace.serving.vectors import RAW, reply, vectors
from headrace.types import EncodeParams, EncodeTask

__all__ = ["embeddings"]


class EmbeddingUsage(msgspec.Struct):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingItem(msgspec.Struct):
    """One vector: numbers, or little-endian float32 in base64 (JSON) or as bytes (MessagePack)."""

    index: int
    embedding: list[float] | str | bytes
    object: str = "embedding"


class EmbeddingReply(msgspec.Struct):
    """All vectors in the order of the inputs."""

    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingUsage
    object: str = "list"


async def embeddings(request: web.Request) -> web.StreamResponse:
    """Turn texts into vectors."""
    body = await read(request, EmbeddingRequest)
    inputs = inputs_of(body.input)
    check_count(request, len(inputs), "input")
    name = body.model
    if name is None:
        name = only_model(request.app[STATE], [EncodeTask.EMBED])
    async with open_call(request, name, len(inputs)) as call:
        call.show_prompt(body.input)
        result = await call.model.engine.embed(
            inputs,
            EncodeParams(dimensions=body.dimensions or None, normalize=body.normalize is not False),
            truncate_prompt_tokens=body.truncate_prompt_tokens,
            truncate=body.truncate,
            truncation_direction=direction(body.truncation_direction),
            prompt_name=body.prompt_name,
            add_special_tokens=body.add_special_tokens is not False,
            priority=body.priority or 0,
            deadline=call.deadline,
        )
        call.record.usage = result.usage
        tokens = result.usage.prompt_tokens

        def wrap(rows: list[Any]) -> EmbeddingReply:
            items = [EmbeddingItem(index, row) for index, row in enumerate(rows)]
            return EmbeddingReply(items, name, EmbeddingUsage(tokens, tokens))

        if body.encoding_format == "base64":
            rows = [base64.b64encode(output.data).decode("ascii") for output in result.outputs]
            return reply(request, wrap(rows))
        return vectors(request, result.outputs, wrap, RAW if body.encoding_format == "bytes" else None)
