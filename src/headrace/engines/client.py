"""How anything outside reaches an engine core: one interface, whatever lies behind it. Imports no torch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Literal, Protocol

import msgspec

from headrace.config.spec import EngineSpec
from headrace.messages import CoreStats, Ready
from headrace.types import EncodeOutput, Output, Request

__all__ = ["EngineClient", "Health"]


class Health(msgspec.Struct, frozen=True):
    """State of a core as seen from outside.

    Attributes:
        status: ``stalled``: there is work and the step loop makes no progress; ``dead``: the process is gone.
        reason: one sentence for people.
    """

    status: Literal["starting", "ok", "draining", "stalled", "dead"]
    reason: str = ""


class EngineClient(Protocol):
    """An engine core, in this process or another.

    Attributes:
        spec: what it was started with.
        ready: what it said once loaded.
        stats: the newest counters.
        num_unfinished: requests submitted and not finished, for admission.
    """

    @property
    def spec(self) -> EngineSpec: ...

    @property
    def ready(self) -> Ready: ...

    @property
    def stats(self) -> CoreStats: ...

    @property
    def num_unfinished(self) -> int: ...

    def generate(self, request: Request) -> AsyncIterator[Output]:
        """Submit and yield every Output up to and including the one with a finish_reason.

        Leaving the iterator early (aclose, cancellation) aborts the request. Raises EngineDead when the core
        dies; a failure of this request alone is an Output with FinishReason.ERROR.
        """
        ...

    async def encode(self, request: Request) -> EncodeOutput:
        """Submit one single-pass request and wait; cancelling aborts it. Raises EngineError on failure."""
        ...

    async def encode_all(self, requests: Sequence[Request]) -> list[EncodeOutput]:
        """The same for several at once, as one message; cancelling aborts all. The first failure is raised."""
        ...

    def abort(self, request_ids: Sequence[str]) -> None:
        """Forget these requests; unknown ids are ignored."""
        ...

    def health(self) -> Health:
        """Judged by progress of the step loop, not by the process being there."""
        ...

    async def close(self, drain: bool = True) -> None:
        """Stop the core, finishing what runs first if asked to."""
        ...
