"""The encode loop: batches by token budget, one pass each, gone as soon as the device is free (no timers)."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from typing import Generic, Protocol, TypeVar

import torch

from headrace.errors import HeadraceError, InvalidRequest, RequestTimeout, Unprocessable
from headrace.messages import CoreStats
from headrace.scheduling.token_budget import TokenBudgetQueue, Waiting
from headrace.types import EncodeOutput, EncodeTask, Request

__all__ = ["EncodeCore", "Pass"]

logger = logging.getLogger("headrace.core")

_SMOOTHING = 0.05  # weight of the newest step in the moving averages


class Pass(Protocol):
    """What the loop needs of a runner.

    Attributes:
        tasks: what the model can do.
        vocab_size, max_tokens: bounds of a request's token ids and of their number.
        dimensions: size of its pooled vectors, 0 if it has none.
        token_types: segments that it tells apart; 0 or 1: it ignores them.
    """

    tasks: frozenset[EncodeTask]
    vocab_size: int
    max_tokens: int
    dimensions: int
    token_types: int

    def run(self, requests: Sequence[Request]) -> list[EncodeOutput]:
        """One pass over these; outputs in their order."""
        ...


P = TypeVar("P", bound=Pass)


class EncodeCore(Generic[P]):
    """Requests in, results out, one batch a step. Not thread-safe: one loop owns it.

    Args:
        runner: the device.
        max_tokens: tokens of one batch; a longer sequence goes alone.
        max_seqs: sequences of one batch.
    """

    def __init__(self, runner: P, *, max_tokens: int, max_seqs: int) -> None:
        self.runner = runner
        self._queue = TokenBudgetQueue(max_tokens, max_seqs)
        self._requests: dict[str, Request] = {}
        self._refused: list[EncodeOutput] = []
        self._steps = self._tokens = self._aborted = 0
        self._step_ms = self._host_ms = 0.0

    def add(self, requests: Iterable[Request]) -> None:
        """Queue requests; one that can never run is answered with an error by the next step."""
        for request in requests:
            try:
                self._check(request)
            except HeadraceError as error:
                code, param = type(error).code, error.param or ""
                self._refused.append(
                    EncodeOutput(request.id, error=error.message, error_code=code, error_param=param)
                )
                continue
            self._requests[request.id] = request
            self._queue.add(Waiting(request.id, len(request.token_ids), request.priority, request.deadline))

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drop these from the queue, at no cost; unknown ids are ignored."""
        for request_id in request_ids:
            request = self._requests.pop(request_id, None)
            if request is not None:
                self._queue.remove((request_id,))
                self._aborted += len(request.token_ids)

    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._requests or self._refused)

    def step(self) -> list[EncodeOutput]:
        """Run one batch; its results, and the errors of requests that never ran."""
        began = time.perf_counter()
        outputs, self._refused = self._refused, []
        ids, expired = self._queue.next_batch(time.monotonic())
        for id in expired:
            del self._requests[id]
            outputs.append(
                EncodeOutput(id, error="the request's deadline passed", error_code=RequestTimeout.code)
            )
        if not ids:
            return outputs
        batch = [self._requests.pop(id) for id in ids]
        ready = time.perf_counter()
        outputs += self._run(batch)
        self._steps += 1
        self._tokens += sum(len(request.token_ids) for request in batch)
        self._host_ms += ((ready - began) * 1e3 - self._host_ms) * _SMOOTHING
        self._step_ms += ((time.perf_counter() - began) * 1e3 - self._step_ms) * _SMOOTHING
        return outputs

    def idle(self) -> None:
        """Called when there is no work: nothing may be left over."""
        assert len(self._queue) == 0
        assert self._queue.num_tokens == 0

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

    def _run(self, batch: list[Request]) -> list[EncodeOutput]:
        """A batch that breaks is run again one by one, so that only the request at fault fails."""
        try:
            return self.runner.run(batch)
        except torch.AcceleratorError:
            raise  # the device's context is lost; the process must be replaced
        except Exception as error:
            logger.exception("a pass over %d sequences failed", len(batch))
            if len(batch) > 1:
                return [output for request in batch for output in self._run([request])]
            return [EncodeOutput(batch[0].id, error=f"the pass failed: {type(error).__name__}: {error}")]

    def _check(self, request: Request) -> None:
        runner: Pass = self.runner
        params = request.encode
        if params is None:
            raise Unprocessable("this model encodes and does not generate; set encode, not sampling")
        for task in (params.task, *params.also):
            if task not in runner.tasks:
                can = ", ".join(sorted(runner.tasks))
                raise Unprocessable(f"this model cannot {task}; it can {can}", param="task")
        if request.id in self._requests:
            raise InvalidRequest(f"request id {request.id!r} is already waiting", param="id")
        size = len(request.token_ids)
        if not 0 < size <= runner.max_tokens:
            raise Unprocessable(
                f"the input has {size} tokens; expected 1 to {runner.max_tokens}", param="input"
            )
        if min(request.token_ids) < 0 or max(request.token_ids) >= runner.vocab_size:
            raise InvalidRequest(
                f"a token id is outside the vocabulary; expected 0 to {runner.vocab_size - 1}", param="input"
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
        if params.dimensions is not None and not 0 < params.dimensions <= runner.dimensions:
            raise InvalidRequest(
                f"dimensions is {params.dimensions}; expected 1 to {runner.dimensions}", param="dimensions"
            )
