"""The table of routes, and the application made of it."""

from __future__ import annotations

from aiohttp import web

from headrace.serving import openapi, probes
from headrace.serving.anthropic.messages import messages
from headrace.serving.anthropic.schemas import MessagesRequest
from headrace.serving.cors import add_cors
from headrace.serving.forward import Forward, is_forwarded
from headrace.serving.middleware import ROUTES, around
from headrace.serving.openai import batches
from headrace.serving.openai.chat import chat_completions
from headrace.serving.openai.completions import completions
from headrace.serving.openai.embeddings import embeddings
from headrace.serving.openai.models import get_model, list_models
from headrace.serving.openai.responses import create_response, delete_response, get_response
from headrace.serving.openai.responses_schema import ResponsesRequest
from headrace.serving.openai.schemas import ChatRequest, CompletionRequest, EmbeddingRequest
from headrace.serving.openai.tokens import DetokenizeRequest, detokenize
from headrace.serving.route import Route
from headrace.serving.state import STATE, State
from headrace.serving.tei import embed, predict, rerank, text
from headrace.serving.tei.classify import classify
from headrace.serving.tei.decide import system_one
from headrace.serving.tei.default import infer, predict_any, rerank_any, tokenize_any
from headrace.serving.tei.schemas import (
    ClassifyRequest,
    CohereRerankRequest,
    DecodeRequest,
    EmbedAllRequest,
    EmbedRequest,
    JinaRerankRequest,
    PredictRequest,
    PredictTokensRequest,
    RerankRequest,
    SimilarityRequest,
    SparseRequest,
    SystemOneRequest,
    TokenizeRequest,
)
from headrace.serving.tei.score import ScoreRequest, score

__all__ = ["TABLE", "make_app"]


TABLE = (
    Route("POST", "/v1/chat/completions", chat_completions, "Answer a conversation.", ChatRequest),
    Route("POST", "/v1/completions", completions, "Continue texts.", CompletionRequest),
    Route(
        "POST", "/v1/responses", create_response, "Answer, as items; stored for a while.", ResponsesRequest
    ),
    Route("GET", "/v1/responses/{id}", get_response, "A stored response."),
    Route("DELETE", "/v1/responses/{id}", delete_response, "Forget a stored response."),
    Route("POST", "/v1/messages", messages, "Answer a conversation in Anthropic's shape.", MessagesRequest),
    Route("POST", "/v1/embeddings", embeddings, "Turn texts into vectors.", EmbeddingRequest),
    Route("POST", "/embeddings", embeddings, "The same.", EmbeddingRequest),
    Route("POST", "/embed", embed.embed, "Turn texts into vectors.", EmbedRequest),
    Route("POST", "/embed_all", embed.embed_all, "One vector for each token.", EmbedAllRequest),
    Route("POST", "/embed_sparse", embed.embed_sparse, "Weights of vocabulary entries.", SparseRequest),
    Route("POST", "/similarity", embed.similarity, "How alike texts are.", SimilarityRequest),
    Route("POST", "/rerank", rerank_any, "Texts by how well they answer a query.", RerankRequest),
    Route("POST", "/v1/rerank", rerank.rerank_jina, "The same in Jina's shape.", JinaRerankRequest),
    Route("POST", "/v2/rerank", rerank.rerank_cohere, "The same in Cohere's shape.", CohereRerankRequest),
    Route("POST", "/v1/systemone", system_one, "Typed questions about a state.", SystemOneRequest),
    Route(
        "POST",
        "/",
        infer,
        "What the model is for: /embed, /rerank, /similarity, /predict or /predict_tokens.",
    ),
    Route("POST", "/invocations", infer, "The same, where platforms send everything."),
    Route(
        "POST", "/classify", classify, "Labels of texts, in the shapes of Infinity and vLLM.", ClassifyRequest
    ),
    Route("POST", "/predict", predict_any, "Labels of texts.", PredictRequest),
    Route("POST", "/predict_tokens", predict.predict_tokens, "Entities in texts.", PredictTokensRequest),
    Route("POST", "/score", score, "How well texts fit each other, in vLLM's shape.", ScoreRequest),
    Route("POST", "/v1/score", score, "The same.", ScoreRequest),
    Route(
        "POST", "/tokenize", tokenize_any, "Tokens of texts (vLLM's prompt, messages too).", TokenizeRequest
    ),
    Route("POST", "/detokenize", detokenize, "The text of token ids, in vLLM's shape.", DetokenizeRequest),
    Route("POST", "/decode", text.decode, "Texts of token ids.", DecodeRequest),
    Route("GET", "/info", text.info, "The models behind these routes."),
    Route("POST", "/v1/files", batches.create_file, "Upload a batch file (multipart: purpose, file)."),
    Route("GET", "/v1/files", batches.list_files, "The files of this key."),
    Route("GET", "/v1/files/{name}", batches.get_file, "One of them."),
    Route("DELETE", "/v1/files/{name}", batches.delete_file, "Delete it."),
    Route("GET", "/v1/files/{name}/content", batches.file_content, "Its content."),
    Route("POST", "/v1/batches", batches.create_batch, "Answer every line of a file.", batches.BatchRequest),
    Route("GET", "/v1/batches", batches.list_batches, "The batches of this key."),
    Route("GET", "/v1/batches/{name}", batches.get_batch, "How far one of them is."),
    Route("POST", "/v1/batches/{name}/cancel", batches.cancel_batch, "Stop it, keeping what is answered."),
    Route("GET", "/v1/models", list_models, "The models served here."),
    Route("GET", "/v1/models/{name:.+}", get_model, "One of them."),
    Route(
        "GET", "/health", probes.health, "200 while every engine makes progress, else 503 with the reason."
    ),
    Route("GET", "/ping", probes.health, "The same, where platforms ask it."),
    Route("POST", "/ping", probes.health, "The same."),
    Route("GET", "/version", probes.version, "The version that runs."),
    Route("GET", "/ready", probes.ready, "200 when every model takes requests."),
    Route("GET", "/metrics", probes.metrics, "Prometheus metrics."),
    Route("GET", "/openapi.json", openapi.description, "This API, as OpenAPI 3.1."),
    Route("GET", "/docs", openapi.page, "This API, to read and to try."),
)


def make_app(state: State, first: str | None = None) -> web.Application:
    """The aiohttp application of one HTTP process.

    Args:
        first: the Unix socket of the server's first process, if this is another one.
    """
    app = web.Application(middlewares=[around], client_max_size=state.options.max_body_bytes)
    add_cors(app, state.options.cors_origins)
    app[STATE] = state
    app[ROUTES] = frozenset(route.path for route in TABLE)
    app[openapi.DOCUMENT] = openapi.build(TABLE)
    forward = None if first is None else Forward(first)
    if forward is not None:
        app.cleanup_ctx.append(forward.session)
    for route in TABLE:
        handler = forward if forward is not None and is_forwarded(route.path) else route.handler
        if route.method == "GET":
            app.router.add_get(route.path, handler, allow_head=True)  # load balancers ask with HEAD
        else:
            app.router.add_route(route.method, route.path, handler)
    return app
