"""POST /predict, where hosted platforms send whatever a model serves: the body's own shape says which route it is."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from headrace.serving.openai.embeddings import embeddings
from headrace.serving.state import STATE
from headrace.serving.tei.decide import system_one
from headrace.serving.tei.predict import predict, predict_tokens
from headrace.serving.tei.rerank import rerank
from headrace.types import EncodeTask

__all__ = ["predict_any"]


_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
# Where the operator's default_route sends what arrives at /predict.
_DEFAULTS: dict[str, _Handler] = {
    "/v1/embeddings": embeddings,
    "/v1/systemone": system_one,
    "/rerank": rerank,
    "/predict": predict,
    "/predict_tokens": predict_tokens,
}


class _Shape(msgspec.Struct):
    model: msgspec.Raw = msgspec.Raw()
    questions: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    query: msgspec.Raw = msgspec.Raw()
    aggregation_strategy: msgspec.Raw = msgspec.Raw()


_decoder = msgspec.json.Decoder(_Shape)


async def predict_any(request: web.Request) -> web.StreamResponse:
    """Labels of texts; a body of another route of this kind is answered as if sent there.

    A model's ``default_route`` is where everything goes.
    """
    shape = _Shape()
    with contextlib.suppress(msgspec.DecodeError, web.HTTPException, UnicodeDecodeError, RecursionError):
        shape = _decoder.decode(await request.read())
    chosen = _default(request, bytes(shape.model))
    if chosen is not None:
        return await _DEFAULTS[chosen](request)
    if bytes(shape.questions):
        return await system_one(request)
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


def _default(request: web.Request, named: bytes) -> str | None:
    """The default route of the model that the body names, or of the only one."""
    models = request.app[STATE].models.all
    if named:
        name = msgspec.json.decode(named)
        models = [model for model in models if name in model.names]
    return models[0].spec.default_route if len(models) == 1 else None
