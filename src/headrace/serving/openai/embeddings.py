"""POST /v1/embeddings"""

from __future__ import annotations

import base64
import struct

import msgspec
from aiohttp import web

from headrace.serving.body import read
from headrace.serving.call import open_call
from headrace.serving.openai.completions import inputs_of
from headrace.serving.openai.replies import encode
from headrace.serving.openai.schemas import EmbeddingRequest
from headrace.types import EncodeOutput, EncodeParams

__all__ = ["embeddings"]


class EmbeddingUsage(msgspec.Struct):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingItem(msgspec.Struct):
    """One vector: numbers, or base64 of little-endian float32."""

    index: int
    embedding: list[float] | str
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
    async with open_call(request, body.model, len(inputs)) as call:
        call.show_prompt(body.input)
        result = await call.model.engine.embed(
            inputs,
            EncodeParams(dimensions=body.dimensions, normalize=body.normalize),
            truncate_prompt_tokens=body.truncate_prompt_tokens,
            add_special_tokens=body.add_special_tokens is not False,
            priority=body.priority or 0,
            deadline=call.deadline,
        )
        call.record.usage = result.usage
        text = body.encoding_format == "base64"
        items = [EmbeddingItem(index, _vector(output, text)) for index, output in enumerate(result.outputs)]
        tokens = result.usage.prompt_tokens
        reply = EmbeddingReply(items, body.model, EmbeddingUsage(tokens, tokens))
        return web.Response(body=encode(reply), content_type="application/json")


def _vector(output: EncodeOutput, as_base64: bool) -> list[float] | str:
    if as_base64:
        return base64.b64encode(output.data).decode("ascii")
    return list(struct.unpack(f"<{len(output.data) // 4}f", output.data))
