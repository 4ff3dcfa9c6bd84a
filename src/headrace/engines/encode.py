"""The encode loop: batches by token budget, one pass each, gone as soon as the device is free (no timers)."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, cast

import torch

from headrace.errors import HeadraceError, InvalidRequest, RequestError, RequestTimeout, Unprocessable
from headrace.messages import CoreStats
from headrace.scheduling.token_budget import TokenBudgetQueue, Waiting
from headrace.types import EncodeOutput, EncodeParams, EncodeTask, Request

__all__ = ["EncodeCore", "Launched", "OverlappingPass", "Pass"]

logger = logging.getLogger("headrace.core")

_SMOOTHING = 0.05  # weight of the newest step in the moving averages
# How one step waits for the device: without sleeping while a single short text may be done any moment, then
# in naps, and never so long that new messages wait.
_SPIN_SECONDS = 2e-3
_STEP_SECONDS = 2e-4
_NAP_SECONDS = 5e-5


class Pass(Protocol):
    """What the loop needs of a runner.

    Attributes:
        tasks: what the model can do.
        max_tokens: of one request.
        dimensions: size of its pooled vectors, 0 if it has none.
        token_types: segments that it tells apart; 0 or 1: it ignores them.
    """

    tasks: frozenset[EncodeTask]
    max_tokens: int
    dimensions: int
    token_types: int

    def run(self, requests: Sequence[Request]) -> list[EncodeOutput]:
        """One pass over these; outputs in their order. Raises InvalidRequest when one holds a wrong token id."""
        ...


class Launched(Protocol):
    """A pass under way."""

    def done(self) -> bool:
        """Whether `finish` would return at once."""
        ...

    def finish(self) -> list[EncodeOutput]:
        """Wait for it; outputs in the order of its requests."""
        ...


class OverlappingPass(Pass, Protocol):
    """A runner whose device works by itself."""

    def launch(self, requests: Sequence[Request]) -> Launched:
        """Begin a pass over these and return; passes run one after another."""
        ...

    def prepare_next(self) -> bool:
        """A little of what would make a later pass wait; true if more is left."""
        ...


@dataclass(slots=True)
class _Running:
    batch: list[Request]
    launched: Launched
    began: float


P = TypeVar("P", bound=Pass)


class EncodeCore(Generic[P]):
    """Requests in, results out, one batch a step. Not thread-safe: one loop owns it.

    Args:
        runner: the device.
        max_tokens: tokens of one batch; a longer sequence goes alone.
        max_seqs: sequences of one batch.
        overlap: the runner is an OverlappingPass: pack a batch and answer another while the device works.
    """

    def __init__(self, runner: P, *, max_tokens: int, max_seqs: int, overlap: bool = False) -> None:
        self.runner = runner
        self._overlapping = cast(OverlappingPass, runner) if overlap else None
        self._max_tokens, self._max_seqs = max_tokens, max_seqs
        self._running: _Running | None = None
        self._queue = TokenBudgetQueue(max_tokens, max_seqs)
        self._requests: dict[str, Request] = {}
        self._known: EncodeParams | None = None  # the last ones that were found right
        self._refused: list[EncodeOutput] = []
        self._steps = self._tokens = self._aborted = 0
        self._step_ms = self._host_ms = 0.0

    def add(self, requests: Iterable[Request]) -> None:
        """Queue requests; one that can never run is answered with an error by the next step."""
        for request in requests:
            try:
                self._check(request)
            except HeadraceError as error:
                self._refused.append(_refusal(request, error))
                continue
            self._requests[request.id] = request
            self._queue.add(Waiting(request.id, len(request.token_ids), request.priority, request.deadline))

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drop these from the queue, at no cost; unknown ids are ignored. What runs ends unheard."""
        for request_id in request_ids:
            request = self._requests.pop(request_id, None)
            if request is not None and self._queue.remove((request_id,)):
                self._aborted += len(request.token_ids)

    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._requests or self._refused or self._running)

    def step(self) -> list[EncodeOutput]:
        """Run one batch; its results, and the errors of requests that never ran.

        With overlap: launch the next batch as soon as the device is free (or two full ones in a row), and
        return what is ready, which may be nothing.
        """
        outputs, self._refused = self._refused, []
        running = self._running
        if running is not None and not self._full() and not _wait(running):
            return outputs
        began = time.perf_counter()
        batch = self._next_batch(outputs)
        self._host_ms += ((time.perf_counter() - began) * 1e3 - self._host_ms) * _SMOOTHING
        self._running = None
        if batch and self._overlapping is not None:
            self._running = self._launch(self._overlapping, batch, began, outputs)
        elif batch:
            self._settle(batch, self._run(batch), began, outputs)
        if running is not None:
            self._finish(running, outputs)
        return outputs

    def idle(self) -> bool:
        """Called when there is no work: nothing may be left over. Then another graph is captured, if one is left."""
        assert len(self._queue) == 0
        assert self._queue.num_tokens == 0
        assert self._running is None
        return self._overlapping is not None and self._overlapping.prepare_next()

    def stats(self) -> CoreStats:
        """Counters and gauges."""
        return CoreStats(
            steps=self._steps,
            num_waiting=len(self._queue),
            prompt_tokens=self._tokens,
            aborted_tokens=self._aborted,
            step_ms=self._step_ms,
            host_ms=self._host_ms,
        )

    def close(self) -> None:
        """Nothing to free."""

    def _full(self) -> bool:
        """Whether what waits fills a batch."""
        return self._queue.num_tokens >= self._max_tokens or len(self._queue) >= self._max_seqs

    def _next_batch(self, outputs: list[EncodeOutput]) -> list[Request]:
        """Take a batch out of the queue; expired requests are answered."""
        ids, expired = self._queue.next_batch(time.monotonic())
        for id in expired:
            del self._requests[id]
            outputs.append(
                EncodeOutput(id, error="the request's deadline passed", error_code=RequestTimeout.code)
            )
        return [self._requests[id] for id in ids]

    def _launch(
        self, runner: OverlappingPass, batch: list[Request], began: float, outputs: list[EncodeOutput]
    ) -> _Running | None:
        try:
            return _Running(batch, runner.launch(batch), began)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if not isinstance(error, RequestError):
                logger.exception("a pass over %d sequences failed", len(batch))
            self._settle(batch, self._each(batch), began, outputs)
            return None

    def _finish(self, running: _Running, outputs: list[EncodeOutput]) -> None:
        try:
            results = running.launched.finish()
        except torch.AcceleratorError:
            raise
        except Exception:
            logger.exception("a pass over %d sequences failed", len(running.batch))
            results = self._each(running.batch)
        self._settle(running.batch, results, running.began, outputs)

    def _settle(
        self, batch: list[Request], results: list[EncodeOutput], began: float, outputs: list[EncodeOutput]
    ) -> None:
        """Count a batch, and hand over the results that somebody still waits for."""
        self._steps += 1
        self._tokens += sum(len(request.token_ids) for request in batch)
        self._step_ms += ((time.perf_counter() - began) * 1e3 - self._step_ms) * _SMOOTHING
        for request, result in zip(batch, results, strict=True):
            if self._requests.get(request.id) is request:
                del self._requests[request.id]
                outputs.append(result)

    def _run(self, batch: list[Request]) -> list[EncodeOutput]:
        """A batch that breaks is run again one by one, so that only the request at fault fails."""
        try:
            return self.runner.run(batch)
        except torch.AcceleratorError:
            raise  # the device's context is lost; the process must be replaced
        except RequestError as error:  # of one of these
            return self._each(batch) if len(batch) > 1 else [_refusal(batch[0], error)]
        except Exception as error:
            logger.exception("a pass over %d sequences failed", len(batch))
            if len(batch) > 1:
                return self._each(batch)
            return [EncodeOutput(batch[0].id, error=f"the pass failed: {type(error).__name__}: {error}")]

    def _each(self, batch: list[Request]) -> list[EncodeOutput]:
        return [output for request in batch for output in self._run([request])]

    def _check(self, request: Request) -> None:
        """Raise what is wrong with a request, but for its token ids: the runner judges those of a batch at once."""
        runner: Pass = self.runner
        if request.encode is None or request.encode != self._known:
            self._check_params(request.encode)
            self._known = request.encode
        if request.id in self._requests:
            raise InvalidRequest(f"request id {request.id!r} is already waiting", param="id")
        size = len(request.token_ids)
        if not 0 < size <= runner.max_tokens:
            raise Unprocessable(
                f"the input has {size} tokens; expected 1 to {runner.max_tokens}", param="input"
            )
        if request.token_types and len(request.token_types) != size:
            raise InvalidRequest(
                f"token_types has {len(request.token_types)} entries; expected {size}", param="token_types"
            )
        if request.token_types and runner.token_types > 1:
            low, high = min(request.token_types), max(request.token_types)
            if low < 0 or high >= runner.token_types:
                raise InvalidRequest(
                    f"token_types holds {low if low < 0 else high}; expected 0 to {runner.token_types - 1}",
                    param="token_types",
                )

    def _check_params(self, params: EncodeParams | None) -> None:
        runner: Pass = self.runner
        if params is None:
            raise Unprocessable("this model encodes and does not generate; set encode, not sampling")
        for task in (params.task, *params.also):
            if task not in runner.tasks:
                can = ", ".join(sorted(runner.tasks))
                raise Unprocessable(f"this model cannot {task}; it can {can}", param="task")
        if params.dimensions is not None and not 0 < params.dimensions <= runner.dimensions:
            raise InvalidRequest(
                f"dimensions is {params.dimensions}; expected 1 to {runner.dimensions}", param="dimensions"
            )


def _refusal(request: Request, error: HeadraceError) -> EncodeOutput:
    return EncodeOutput(
        request.id, error=error.message, error_code=type(error).code, error_param=error.param or ""
    )


def _wait(running: _Running) -> bool:
    """Wait a moment for the device; whether it is done."""
    end = time.perf_counter() + _STEP_SECONDS
    while not running.launched.done():
        now = time.perf_counter()
        if now >= end:
            return False
        if now - running.began > _SPIN_SECONDS:
            time.sleep(_NAP_SECONDS)
    return True
