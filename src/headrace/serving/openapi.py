"""The API described: /openapi.json and /docs."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib import resources
from typing import Any

import msgspec
from aiohttp import web
from pydantic.json_schema import models_json_schema

from headrace import __version__
from headrace.serving.route import Route

__all__ = ["DOCUMENT", "build", "description", "page"]

DOCUMENT: web.AppKey[bytes] = web.AppKey("openapi", bytes)
_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def build(routes: Iterable[Route]) -> bytes:
    """The OpenAPI document as JSON."""
    routes = list(routes)
    bodies = list(dict.fromkeys(route.body for route in routes if route.body is not None))
    names, schemas = models_json_schema(
        [(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, Any] = {}
    for route in routes:
        operation: dict[str, Any] = {
            "summary": route.text,
            "responses": {
                "200": {"description": "OK"},
                "default": {
                    "description": "Error",
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                },
            },
        }
        if route.body is not None:
            schema = names[(route.body, "validation")]
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        path = route.path.replace(":.+", "")
        if "{name}" in path:
            operation["parameters"] = [
                {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
            ]
        paths.setdefault(path, {})[route.method.lower()] = operation
    document = {
        "openapi": "3.1.0",
        "info": {"title": "Headrace", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": schemas.get("$defs", {}) | {"Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }
    return msgspec.json.encode(document)


async def description(request: web.Request) -> web.Response:
    """GET /openapi.json"""
    return web.Response(body=request.app[DOCUMENT], content_type="application/json")


@cache
def _page() -> bytes:
    return (resources.files("headrace.serving") / "static" / "docs.html").read_bytes()


async def page(request: web.Request) -> web.Response:
    """GET /docs: one file, nothing from elsewhere."""
    return web.Response(body=_page(), content_type="text/html", charset="utf-8")
