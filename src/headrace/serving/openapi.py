"""The API described: /openapi.json, /docs, and the tables of fields in docs/api.md."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from headrace import __version__
from headrace.serving.route import Route

__all__ = ["DOCUMENT", "build", "description", "fields_table", "page"]

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


def fields_table(schema: type[BaseModel]) -> str:
    """A Markdown table of a request's fields."""
    properties = schema.model_json_schema()["properties"]
    lines = ["| Field | Type | Effect | What it does |", "|---|---|---|---|"]
    for name, row in properties.items():
        allowed = list(row.get("allowed", []))
        effect = row.get("effect", "acted on")
        if effect == "refused":
            same = list(
                dict.fromkeys(
                    f"{value:g}" if isinstance(value, float) else str(value).lower() for value in allowed
                )
            )
            effect = "refused unless null" + "".join(f" or `{value}`" for value in same if value)
        lines.append(f"| `{name}` | {_type(row)} | {effect} | {row.get('description', '')} |")
    return "\n".join(lines) + "\n"


def _type(row: dict[str, Any]) -> str:
    if "$ref" in row:
        return "object"
    if "enum" in row:
        return " ".join(f"`{value}`" for value in row["enum"])
    if "anyOf" in row:
        parts = [_type(one) for one in row["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(parts)) or "any"
    if row.get("type") == "array":
        return f"list of {_type(row['items'])}"
    return str(row.get("type", "any"))


def write_tables(file: Path) -> None:
    """Put the tables of fields between their marks in a Markdown file; schemas without a mark are left out."""
    from headrace.serving.app import TABLE  # which is made with this module

    text = file.read_text(encoding="utf-8")
    for schema in dict.fromkeys(route.body for route in TABLE if route.body is not None):
        begin, end = f"<!-- {schema.__name__} -->\n", "<!-- end -->"
        if begin in text:
            before, _, rest = text.partition(begin)
            text = before + begin + fields_table(schema) + end + rest.partition(end)[2]
    file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    import sys

    write_tables(Path(sys.argv[1]))
