"""The client side of a core, whatever carries its messages: hands outputs to whoever waits for them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence

from headrace import errors
from headrace.config.spec import EngineSpec
from headrace.engines.client import Health
from headrace.messages import (
    Abort,
    CoreStats,
    EncodeOutputs,
    Failed,
    FromCore,
    Heartbeat,
    Loading,
    Outputs,
    Ready,
    Submit,
    ToCore,
)
from headrace.types import EncodeOutput, FinishReason, Output, Request

__all__ = ["DispatchClient", "error_of"]

log = logging.getLogger(__name__)
_STALL_SECONDS = 5.0  # a step of a GPU takes milliseconds
_STALL_SECONDS_CPU = 20.0  # one of a CPU may take seconds
_STALL_STEPS = 20
_IDLE_SECONDS = 30.0  # with work and without a step: a grammar may be compiling for the only request


def error_of(failed: Failed) -> errors.HeadraceError:
    """The exception that a core's Failed message stands for."""
    return errors.from_code(failed.code, failed.message, default=errors.EngineDead)


class DispatchClient:
    """EngineClient over any transport; lives on one event loop.

    Subclasses provide `_send`, and call `_receive` on the event loop for each message that arrives.

    Args:
        spec: what the core was started with.
        ready: its first message.
    """

    def __init__(self, spec: EngineSpec, ready: Ready) -> None:
        self.spec = spec
        self.ready = ready
        self.stats = CoreStats()
        self._generating: dict[str, asyncio.Queue[Output]] = {}
        self._encoding: dict[str, asyncio.Future[EncodeOutput]] = {}
        self._last_heard = self._last_step = time.monotonic()
        self._failure: str | None = None
        self._draining = False

    @property
    def num_unfinished(self) -> int:
        """Requests submitted and not finished."""
        return len(self._generating) + len(self._encoding)

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """See EngineClient."""
        self._check_open(request.id)
        queue: asyncio.Queue[Output] = asyncio.Queue()
        self._generating[request.id] = queue
        finished = False
        try:
            self._send(Submit((request,)))
            while not finished:
                output = await queue.get()
                finished = output.finish_reason is not None
                if finished and self._failure is not None and output.error == self._failure:
                    raise errors.EngineDead(self._failure)
                yield output
        finally:
            if self._generating.pop(request.id, None) is not None and not finished:
                self.abort((request.id,))

    async def encode(self, request: Request) -> EncodeOutput:
        """See EngineClient."""
        return (await self.encode_all((request,)))[0]

    async def encode_all(self, requests: Sequence[Request]) -> list[EncodeOutput]:
        """See EngineClient."""
        loop = asyncio.get_running_loop()
        futures: dict[str, asyncio.Future[EncodeOutput]] = {}
        for request in requests:
            self._check_open(request.id)
            futures[request.id] = loop.create_future()
        self._encoding.update(futures)
        try:
            self._send(Submit(tuple(requests)))
            outputs = [await future for future in futures.values()]
        except asyncio.CancelledError:
            # Cancelling the task has cancelled the future that it waited for, too.
            self.abort([id for id, future in futures.items() if future.cancelled() or not future.done()])
            raise
        finally:
            for id in futures:
                self._encoding.pop(id, None)
        for output in outputs:
            if output.error:
                code = errors.EngineDead.code if self._failure else output.error_code
                raise errors.from_code(code, output.error, output.error_param or None)
        return outputs

    def abort(self, request_ids: Sequence[str]) -> None:
        """See EngineClient."""
        if self._failure is None:
            self._send(Abort(tuple(request_ids)))

    def health(self) -> Health:
        """See EngineClient."""
        if self._failure is not None:
            return Health("dead", self._failure)
        silent = time.monotonic() - self._last_heard
        if silent > self._patience():
            return Health("stalled", f"the step loop has given no sign of life for {silent:.0f} s")
        still = time.monotonic() - self._last_step
        if still > max(_IDLE_SECONDS, self._patience()):
            return Health("stalled", f"the step loop has requests and has made no step for {still:.0f} s")
        return Health("draining") if self._draining else Health("ok")

    def _patience(self) -> float:
        """Seconds of silence that are a stall: many times what a step takes, so that load is not mistaken for it."""
        least = _STALL_SECONDS if self.ready.summary.get("device", "cpu") != "cpu" else _STALL_SECONDS_CPU
        return max(least, _STALL_STEPS * self.stats.step_ms / 1e3)

    async def close(self, drain: bool = True) -> None:
        """See EngineClient."""
        raise NotImplementedError

    def _send(self, message: ToCore) -> None:
        raise NotImplementedError

    def _receive(self, message: FromCore) -> None:
        self._last_heard = time.monotonic()
        match message:
            case Outputs(outputs, stats):
                self._count(stats)
                for output in outputs:
                    queue = self._generating.get(output.request_id)
                    if queue is not None:
                        queue.put_nowait(output)
            case EncodeOutputs(encoded, stats):
                self._count(stats)
                for result in encoded:
                    future = self._encoding.get(result.request_id)
                    if future is not None and not future.done():
                        future.set_result(result)
            case Heartbeat(stats):
                self._count(stats)
            case Failed():
                self._fail(message.message)
            case Ready() | Loading():
                pass

    def _count(self, stats: CoreStats) -> None:
        """Take new counters. A loop may turn and beat without getting anywhere: steps are progress, beats are not."""
        if stats.steps != self.stats.steps or not (stats.num_running or stats.num_waiting):
            self._last_step = time.monotonic()
        self.stats = stats

    def _fail(self, reason: str) -> None:
        """The core is gone: everybody who waits learns it now."""
        if self._failure is not None:
            return
        self._failure = reason
        if not self._draining:
            waiting = {"model": self.spec.name, "reason": reason, "requests": self.num_unfinished}
            log.error("engine failed", extra={"fields": waiting})
        for request_id, queue in self._generating.items():
            queue.put_nowait(Output(request_id, finish_reason=FinishReason.ERROR, error=reason))
        for request_id, future in self._encoding.items():
            if not future.done():
                future.set_result(EncodeOutput(request_id, error=reason))

    def _check_open(self, request_id: str) -> None:
        if self._failure is not None:
            raise errors.EngineDead(self._failure)
        if self._draining:
            raise errors.NotReady("the server is shutting down; retry elsewhere")
        if request_id in self._generating or request_id in self._encoding:
            raise errors.InvalidRequest(
                f"request id {request_id!r} is already live; ids must be unique", param="id"
            )
