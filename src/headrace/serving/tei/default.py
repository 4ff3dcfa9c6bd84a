"""Routes that several APIs share: the body's own shape says which of them is meant."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from headrace.errors import HeadraceError, InvalidRequest
from headrace.serving.body import content
from headrace.serving.openai.embeddings import embeddings
from headrace.serving.openai.tokens import tokenize_chat, tokenize_prompt
from headrace.serving.state import STATE
from headrace.serving.tei.decide import system_one
from headrace.serving.tei.embed import embed, embed_all, embed_sparse, similarity
from headrace.serving.tei.predict import predict, predict_tokens
from headrace.serving.tei.rerank import rerank, rerank_jina
from headrace.serving.tei.text import tokenize
from headrace.types import EncodeTask

__all__ = ["infer", "predict_any", "rerank_any", "tokenize_any"]


_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
# Where the operator's default_route sends what arrives at /predict.
_DEFAULTS: dict[str, _Handler] = {
    "/v1/embeddings": embeddings,
    "/v1/systemone": system_one,
    "/rerank": rerank,
    "/predict": predict,
    "/predict_tokens": predict_tokens,
}


# What the root path does for a model whose first task this is.
_BY_TASK: dict[EncodeTask, _Handler] = {
    EncodeTask.EMBED: embed,
    EncodeTask.EMBED_ALL: embed_all,
    EncodeTask.SPARSE: embed_sparse,
    EncodeTask.SCORE: predict,
    EncodeTask.CLASSIFY: predict,
    EncodeTask.TOKEN_CLASSIFY: predict_tokens,
}


class _Shape(msgspec.Struct):
    model: msgspec.Raw = msgspec.Raw()
    questions: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    inputs: msgspec.Raw = msgspec.Raw()
    query: msgspec.Raw = msgspec.Raw()
    documents: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    aggregation_strategy: msgspec.Raw = msgspec.Raw()

    def has(self, field: str) -> bool:
        return bool(bytes(getattr(self, field)))


_decoder = msgspec.json.Decoder(_Shape)


async def _shape(request: web.Request) -> _Shape:
    """What a body holds; nothing for one that cannot be read, which the route then refuses."""
    with contextlib.suppress(msgspec.DecodeError, HeadraceError, UnicodeDecodeError, RecursionError):
        return _decoder.decode(await content(request))
    return _Shape()


async def predict_any(request: web.Request) -> web.StreamResponse:
    """Labels of texts; a body of another route of this kind is answered as if sent there.

    A model's ``default_route`` is where everything goes.
    """
    shape = await _shape(request)
    chosen = _default(request, bytes(shape.model))
    if chosen is not None:
        return await _DEFAULTS[chosen](request)
    if shape.has("questions"):
        return await system_one(request)
    if shape.has("input"):
        return await embeddings(request)
    if shape.has("query"):
        return await rerank(request)
    models = request.app[STATE].models.all
    loaded = models[0].loaded if len(models) == 1 else None
    tags = loaded is not None and loaded.embeds and EncodeTask.TOKEN_CLASSIFY in loaded.encoder.card.tasks
    if tags or shape.has("aggregation_strategy"):
        return await predict_tokens(request)
    return await predict(request)


def _default(request: web.Request, named: bytes) -> str | None:
    """The default route of the model that the body names, or of the only one."""
    models = request.app[STATE].models.all
    if named:
        name = msgspec.json.decode(named)
        models = [model for model in models if name in model.names]
    return models[0].spec.default_route if len(models) == 1 else None


async def infer(request: web.Request) -> web.StreamResponse:
    """What the model is for: the root path of text-embeddings-inference, which also tells bodies apart."""
    shape = await _shape(request)
    if shape.has("query"):
        return await rerank_any(request)
    if shape.has("input"):
        return await embeddings(request)
    if shape.has("inputs") and bytes(shape.inputs).lstrip()[:1] == b"{":
        return await similarity(request)
    models = request.app[STATE].models
    if shape.has("model"):
        name = msgspec.json.decode(bytes(shape.model))
        if not isinstance(name, str):
            raise InvalidRequest("model is no text; expected a served name", param="model")
        model = models.find(name)
    elif len(models.all) == 1:
        model = models.all[0]
    else:
        raise InvalidRequest("several models are served here; name one in model", param="model")
    first = model.engine.encoder.card.tasks[0]
    return await _BY_TASK[first](request)


async def rerank_any(request: web.Request) -> web.StreamResponse:
    """Texts by how well they answer a query; a body with ``documents`` is answered as /v1/rerank."""
    shape = await _shape(request)
    return await (rerank_jina if shape.has("documents") else rerank)(request)


async def tokenize_any(request: web.Request) -> web.StreamResponse:
    """Tokens of texts; a body with ``prompt`` or ``messages`` is answered in vLLM's shape."""
    shape = await _shape(request)
    if shape.has("messages"):
        return await tokenize_chat(request)
    return await (tokenize_prompt if shape.has("prompt") else tokenize)(request)
