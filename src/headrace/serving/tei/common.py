"""What the routes for one-pass models share: which model, how many inputs, how long."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from aiohttp import web

from headrace.errors import ContextLengthExceeded, InvalidRequest, NotFound, PayloadTooLarge
from headrace.llm.encoder import Encoder
from headrace.serving.call import Call, open_call
from headrace.serving.state import STATE, State
from headrace.serving.tei.schemas import OnePass
from headrace.text.encoding import Direction, Truncate
from headrace.types import EncodeTask

__all__ = ["check_count", "direction", "listed", "one_pass", "only_model", "truncation"]


@asynccontextmanager
async def one_pass(
    request: web.Request, name: str | None, places: int, *tasks: EncodeTask
) -> AsyncIterator[tuple[Call, Encoder]]:
    """Admit a request to the model that it names, or to the only one that does one of ``tasks``.

    Inputs over the model's length are 413 here, as these routes' clients expect. Raises NotFound,
    InvalidRequest, Unprocessable, Overloaded.
    """
    state = request.app[STATE]
    async with open_call(request, name or only_model(state, tasks), places) as call:
        try:
            yield call, call.model.engine.encoder
        except ContextLengthExceeded as error:
            raise PayloadTooLarge(error.message, param=error.param) from error


def only_model(state: State, tasks: Sequence[EncodeTask]) -> str:
    """The model that serves a task, where the request does not say which."""
    names = [model.name for model in state.models.all]
    if len(names) == 1:
        return names[0]
    cards = {
        model.name: model.loaded.encoder.card.tasks
        for model in state.models.all
        if model.loaded is not None and model.loaded.embeds
    }
    # A reranker can classify too, but it is not what somebody who classifies means.
    fit = [name for name, found in cards.items() if not tasks or found[0] in tasks]
    fit = fit or [name for name, found in cards.items() if set(tasks) & set(found)]
    if len(fit) == 1:
        return fit[0]
    if not fit:
        raise NotFound(f"none of the models served here ({', '.join(names)}) does this", param="model")
    raise InvalidRequest(f"several models here do this ({', '.join(fit)}); name one in model", param="model")


def check_count(request: web.Request, count: int, param: str) -> None:
    """Refuse empty lists (400) and lists over the server's limit (413)."""
    limit = request.app[STATE].options.max_inputs
    if count == 0:
        raise InvalidRequest(f"{param} is an empty list; expected at least one", param=param)
    if count > limit:
        raise PayloadTooLarge(
            f"{param} holds {count} items; the limit is {limit} (--max-inputs)", param=param
        )


def listed(inputs: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """One input or several, as a list."""
    if isinstance(inputs, str):
        return [inputs]
    if inputs and all(isinstance(item, int) for item in inputs):
        return [[item for item in inputs if isinstance(item, int)]]
    return [item for item in inputs if not isinstance(item, int)]


def truncation(encoder: Encoder, body: OnePass, limit: int | None = None) -> Truncate | None:
    """How a request wants long inputs cut; None: refused."""
    cut = encoder.auto_truncate is not None if body.truncate is None else body.truncate
    if not cut and limit is None:
        return None
    return Truncate(direction(body.truncation_direction), limit)


def direction(given: str | None) -> Direction | None:
    """text-embeddings-inference writes it with a capital."""
    return None if given is None else "left" if given.lower() == "left" else "right"
