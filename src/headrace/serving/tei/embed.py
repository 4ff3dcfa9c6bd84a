"""POST /embed, /embed_all, /embed_sparse and /similarity"""

from __future__ import annotations

from typing import Any

import numpy as np
from aiohttp import web

from headrace.errors import Unprocessable
from headrace.llm.encoder import Embeddings
from headrace.serving.body import read
from headrace.serving.tei.common import check_count, listed, one_pass, truncation
from headrace.serving.tei.schemas import (
    EmbedAllRequest,
    EmbedRequest,
    OnePass,
    SimilarityParameters,
    SimilarityRequest,
    SparseRequest,
)
from headrace.serving.vectors import array, reply, vectors
from headrace.types import EncodeParams, EncodeTask

__all__ = ["embed", "embed_all", "embed_sparse", "similarity"]


async def embed(request: web.Request) -> web.StreamResponse:
    """One vector for each text."""
    body = await read(request, EmbedRequest)
    params = EncodeParams(normalize=body.normalize is not False, dimensions=body.dimensions)
    result = await _run(request, body, body.inputs, body.prompt_name, params)
    return vectors(request, result.outputs, lambda rows: rows)


async def embed_all(request: web.Request) -> web.StreamResponse:
    """One vector for each token."""
    body = await read(request, EmbedAllRequest)
    result = await _run(request, body, body.inputs, body.prompt_name, EncodeParams(task=EncodeTask.EMBED_ALL))
    return vectors(request, result.outputs, lambda rows: rows)


async def embed_sparse(request: web.Request) -> web.StreamResponse:
    """Weights of vocabulary entries for each text."""
    body = await read(request, SparseRequest)
    result = await _run(request, body, body.inputs, body.prompt_name, EncodeParams(task=EncodeTask.SPARSE))
    rows = []
    for output in result.outputs:
        pairs = zip(np.frombuffer(output.indices, "<u4").tolist(), array(output).tolist())
        rows.append([{"index": index, "value": value} for index, value in pairs])
    return reply(request, rows)


async def _run(
    request: web.Request, body: OnePass, inputs: Any, prompt: str | None, params: EncodeParams
) -> Embeddings:
    items = listed(inputs)
    check_count(request, len(items), "inputs")
    async with one_pass(request, body.model, len(items), params.task) as (call, encoder):
        encoder.check(params.task)
        call.show_prompt(inputs)
        cut = truncation(encoder, body)
        encoded = await encoder.texts(items, prompt=prompt, truncate=cut, param="inputs")
        result = await encoder.run(encoded, params, deadline=call.deadline)
        call.record.usage = result.usage
        return result


async def similarity(request: web.Request) -> web.StreamResponse:
    """How alike a text is to others, by the checkpoint's own measure."""
    body = await read(request, SimilarityRequest)
    check_count(request, len(body.inputs.sentences), "inputs.sentences")
    texts = [body.inputs.source_sentence, *body.inputs.sentences]
    options = body.parameters or SimilarityParameters()
    how = OnePass(truncate=options.truncate, truncation_direction=options.truncation_direction)
    async with one_pass(request, body.model, len(texts), EncodeTask.EMBED) as (call, encoder):
        measure = _MEASURES.get(encoder.card.similarity)
        if measure is None:
            raise Unprocessable(
                f"this checkpoint compares by {encoder.card.similarity!r}; known are {', '.join(_MEASURES)}",
                param="model",
            )
        cut = truncation(encoder, how)
        encoded = await encoder.texts(texts, prompt=options.prompt_name, truncate=cut, param="inputs")
        result = await encoder.run(encoded, EncodeParams(), deadline=call.deadline)
        call.record.usage = result.usage
        rows = np.stack([array(output) for output in result.outputs])
        return reply(request, measure(rows[0], rows[1:]).tolist())


def _cosine(one: Any, many: Any) -> Any:
    lengths = np.linalg.norm(one) * np.linalg.norm(many, axis=1)
    return many @ one / np.maximum(lengths, np.float32(1e-12))


_MEASURES = {
    "cosine": _cosine,
    "dot": lambda one, many: many @ one,
    "euclidean": lambda one, many: -np.linalg.norm(many - one, axis=1),
    "manhattan": lambda one, many: -np.abs(many - one).sum(axis=1),
}
