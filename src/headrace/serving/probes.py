"""GET /health (alive and making progress), /ready (all models loaded), /version, /metrics."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from headrace import __version__
from headrace.serving.openai.replies import encode
from headrace.serving.state import STATE, State

__all__ = ["health", "metrics", "ready", "version"]

_RED = ("stalled", "dead")


def _states(state: State) -> dict[str, dict[str, str]]:
    rows = {}
    for model in state.models.all:
        if model.loaded is None:
            rows[model.name] = {"status": "starting", "reason": "loading"}
        else:
            found = model.loaded.health()
            rows[model.name] = {"status": found.status, "reason": found.reason}
    return rows


def _reply(status: int, word: str, reason: str, models: dict[str, Any]) -> web.Response:
    body = encode({"status": word, "reason": reason, "models": models})
    return web.Response(status=status, body=body, content_type="application/json")


def _reason(rows: dict[str, dict[str, str]], names: list[str]) -> str:
    return "; ".join(f"model {n!r} is {rows[n]['status']}: {rows[n]['reason']}" for n in names)


async def health(request: web.Request) -> web.Response:
    """503 with the reason when an engine is dead or makes no progress; loading and draining are healthy."""
    rows = _states(request.app[STATE])
    red = [name for name, row in rows.items() if row["status"] in _RED]
    if red:
        return _reply(503, "unhealthy", _reason(rows, red), rows)
    return _reply(200, "ok", "", rows)


async def version(_: web.Request) -> web.Response:
    """The version that runs."""
    return web.Response(body=encode({"version": __version__}), content_type="application/json")


async def ready(request: web.Request) -> web.Response:
    """200 when every model takes requests."""
    state = request.app[STATE]
    rows = _states(state)
    if state.draining:
        return _reply(503, "draining", "the server is shutting down", rows)
    waiting = [name for name, row in rows.items() if row["status"] != "ok"]
    if waiting:
        return _reply(503, "not ready", _reason(rows, waiting), rows)
    if state.joining:
        return _reply(503, "not ready", "further HTTP processes are starting", rows)
    return _reply(200, "ok", "", rows)


async def metrics(request: web.Request) -> web.Response:
    """Prometheus' text format."""
    state = request.app[STATE]
    text = state.metrics.text(await state.other_counts())
    return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
