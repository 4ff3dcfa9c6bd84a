"""The table of routes, and the application made of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from aiohttp import web
from pydantic import BaseModel

from headrace.serving import openapi, probes
from headrace.serving.anthropic.messages import messages
from headrace.serving.anthropic.schemas import MessagesRequest
from headrace.serving.middleware import ROUTES, around
from headrace.serving.openai.chat import chat_completions
from headrace.serving.openai.completions import completions
from headrace.serving.openai.embeddings import embeddings
from headrace.serving.openai.models import get_model, list_models
from headrace.serving.openai.responses import create_response, delete_response, get_response
from headrace.serving.openai.responses_schema import ResponsesRequest
from headrace.serving.openai.schemas import ChatRequest, CompletionRequest, EmbeddingRequest
from headrace.serving.state import STATE, State

__all__ = ["TABLE", "Route", "make_app"]


class Route(NamedTuple):
    """One route: what it takes, and one sentence for the API page."""

    method: str
    path: str
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    text: str
    body: type[BaseModel] | None = None


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
    Route("GET", "/v1/models", list_models, "The models served here."),
    Route("GET", "/v1/models/{name:.+}", get_model, "One of them."),
    Route(
        "GET", "/health", probes.health, "200 while every engine makes progress, else 503 with the reason."
    ),
    Route("GET", "/ready", probes.ready, "200 when every model takes requests."),
    Route("GET", "/metrics", probes.metrics, "Prometheus metrics."),
    Route("GET", "/openapi.json", openapi.description, "This API, as OpenAPI 3.1."),
    Route("GET", "/docs", openapi.page, "This API, to read and to try."),
)


def make_app(state: State) -> web.Application:
    """The aiohttp application of one server."""
    app = web.Application(middlewares=[around], client_max_size=state.options.max_body_bytes)
    app[STATE] = state
    app[ROUTES] = frozenset(route.path for route in TABLE)
    app[openapi.DOCUMENT] = openapi.build(TABLE)
    for route in TABLE:
        app.router.add_route(route.method, route.path, route.handler)
    return app
