"""POST /predict, where hosted platforms send whatever a model serves: the body's own shape says which route it is."""

from __future__ import annotations

import contextlib

import msgspec
from aiohttp import web

from headrace.serving.openai.embeddings import embeddings
from headrace.serving.state import STATE
from headrace.serving.tei.predict import predict, predict_tokens
from headrace.serving.tei.rerank import rerank
from headrace.types import EncodeTask

__all__ = ["predict_any"]


class _Shape(msgspec.Struct):
    input: msgspec.Raw = msgspec.Raw()
    query: msgspec.Raw = msgspec.Raw()
    aggregation_strategy: msgspec.Raw = msgspec.Raw()


_decoder = msgspec.json.Decoder(_Shape)


async def predict_any(request: web.Request) -> web.StreamResponse:
    """Labels of texts; a body of /v1/embeddings, /rerank or /predict_tokens is answered as if sent there."""
    shape = _Shape()
    with contextlib.suppress(msgspec.DecodeError, web.HTTPException, UnicodeDecodeError, RecursionError):
        shape = _decoder.decode(await request.read())
    if bytes(shape.input):
        return await embeddings(request)
    if bytes(shape.query):
        return await rerank(request)
    models = request.app[STATE].models.all
    loaded = models[0].loaded if len(models) == 1 else None
    tags = loaded is not None and loaded.embeds and EncodeTask.TOKEN_CLASSIFY in loaded.encoder.card.tasks
    if tags or bytes(shape.aggregation_strategy):
        return await predict_tokens(request)
    return await predict(request)
