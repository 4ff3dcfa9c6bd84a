"""What the table of routes is made of."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from aiohttp import web
from pydantic import BaseModel

__all__ = ["Route"]


class Route(NamedTuple):
    """One route: what it takes, and one sentence for the API page."""

    method: str
    path: str
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    text: str
    body: type[BaseModel] | None = None
