"""GET /v1/models and /v1/models/{name}"""

from __future__ import annotations

from typing import Any

from aiohttp import web

from headrace.serving.openai.replies import encode
from headrace.serving.state import STATE, Model

__all__ = ["get_model", "list_models"]


def _card(name: str, model: Model) -> dict[str, Any]:
    card: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "headrace",
        "root": model.name,
        "parent": None,
        "ready": model.loaded is not None,
    }
    if model.loaded is not None:
        card["max_model_len"] = model.loaded.max_model_len
        card["task"] = "embed" if model.loaded.embeds else "generate"
    return card


async def list_models(request: web.Request) -> web.Response:
    """Every name that clients may use."""
    cards = [_card(name, model) for model in request.app[STATE].models.all for name in model.names]
    return web.Response(body=encode({"object": "list", "data": cards}), content_type="application/json")


async def get_model(request: web.Request) -> web.Response:
    """One of them."""
    name = request.match_info["name"]
    model = request.app[STATE].models.find(name)
    return web.Response(body=encode(_card(name, model)), content_type="application/json")
