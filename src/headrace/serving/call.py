"""The context of one request to a model: its ids, deadline, place in the queue and record."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from headrace.errors import InvalidRequest, RequestTimeout
from headrace.serving.exchange import current
from headrace.serving.metrics import Record
from headrace.serving.state import STATE, Model, State

__all__ = ["Call", "open_call"]

_MAX_TIMEOUT_MS = 24 * 3600 * 1000


class Call:
    """One admitted request.

    Attributes:
        deadline: seconds of the monotonic clock (the event loop's), from the header Request-Timeout-Ms.
    """

    def __init__(self, request: web.Request, state: State, model: Model, deadline: float | None) -> None:
        self.request = request
        self.state = state
        self.model = model
        self.deadline = deadline
        self._timer = asyncio.timeout_at(deadline)
        self.record = Record(state.metrics.model(model.name))

    @property
    def expired(self) -> bool:
        """Whether the deadline is what cancels this task."""
        return self._timer.expired()

    def too_late(self) -> RequestTimeout:
        """What to answer then."""
        given = self.request.headers["Request-Timeout-Ms"]
        return RequestTimeout(
            f"not finished within the {given} ms of Request-Timeout-Ms", param="Request-Timeout-Ms"
        )

    def show_prompt(self, prompt: object) -> None:
        """Keep the prompt for the log, if this server logs prompts."""
        if self.state.options.log_prompts:
            current().prompt = prompt


def deadline_of(request: web.Request) -> float | None:
    """When the caller stops waiting, by the header Request-Timeout-Ms; raises InvalidRequest."""
    given = request.headers.get("Request-Timeout-Ms")
    if given is None:
        return None
    if not given.isdecimal() or not 1 <= int(given[:12]) <= _MAX_TIMEOUT_MS:
        raise InvalidRequest(
            f"the header Request-Timeout-Ms is {given[:40]!r}; expected 1 to {_MAX_TIMEOUT_MS} milliseconds",
            param="Request-Timeout-Ms",
        )
    return asyncio.get_running_loop().time() + int(given) / 1000


@asynccontextmanager
async def open_call(request: web.Request, name: str, places: int = 1) -> AsyncIterator[Call]:
    """Find the model, take ``places`` in its queue, and keep the record until the reply has ended.

    Raises NotFound, NotReady, Overloaded, InvalidRequest, and RequestTimeout when the deadline passes inside.
    """
    state = request.app[STATE]
    deadline = deadline_of(request)
    model = state.models.find(name)
    exchange = current()
    exchange.model = model.name
    with state.admission.place(model, places):
        call = Call(request, state, model, deadline)
        exchange.record = call.record
        try:
            async with call._timer:
                yield call
        except TimeoutError as error:
            if not call.expired:
                raise
            call.record.fail(error)
            raise call.too_late() from error
        except BaseException as error:
            call.record.fail(error)
            raise
        finally:
            call.record.close()
