"""The generate loop: schedule, run, settle.

The plain loop is the specification. The overlapped loop is made of the same parts: while the device runs step n
the host plans and packs step n + 1, and settles step n only then; tokens go from step to step on the device.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from headrace.errors import HeadraceError, InvalidRequest
from headrace.execution.constraints.compiler import ConstraintCompiler
from headrace.execution.constraints.table import ConstraintTable, PendingMasks
from headrace.execution.device_memory import forget_workspaces
from headrace.execution.runner import Runner, Step, StepResult
from headrace.kvcache.blocks import AccountError
from headrace.messages import CoreStats
from headrace.scheduling.plan import StepPlan
from headrace.scheduling.scheduler import Scheduler
from headrace.scheduling.sequence import Sequence
from headrace.types import FinishReason, Output, Request, TokenLogprobs

__all__ = ["GenerateCore"]

logger = logging.getLogger("headrace.core")

_T = TypeVar("_T")
_PAUSE = 0.0005  # seconds
_SMOOTHING = 0.05  # weight of the newest step in the moving averages
_UNNOTICED_MS = 3.0  # for which the device may be left to itself, and whoever arrives or leaves waits


class _Device:
    """Where steps run: CUDA queues them by itself; the overlapped loop on a CPU needs a thread for it."""

    def __init__(self, threaded: bool) -> None:
        self._pool = ThreadPoolExecutor(1, "headrace-device") if threaded else None

    def submit(self, work: Callable[[], _T]) -> Future[_T]:
        if self._pool is not None:
            return self._pool.submit(work)
        future: Future[_T] = Future()
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


class GenerateCore:
    """Requests in, outputs out, one step at a time. Not thread-safe: one loop owns it.

    Args:
        runner: the device.
        scheduler: who runs next.
        overlap: prepare the next step while one runs.
        compiler: of constraints; None refuses them.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        *,
        overlap: bool,
        compiler: ConstraintCompiler | None = None,
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.overlap = overlap
        self.constraints = ConstraintTable(compiler, runner.device)
        scheduler.is_ready = self.constraints.is_ready
        self._device = _Device(threaded=overlap and runner.device.type == "cpu")
        self._previous: tuple[StepPlan, Future[Step]] | None = None
        self._pending: PendingMasks | None = None  # of the previous step, whose sampling waits for them
        self._refused: list[Output] = []
        self._prompt_logprobs: dict[str, dict[int, TokenLogprobs]] = {}
        self._counts = {"steps": 0, "prompt": 0, "output": 0, "aborted": 0}
        self._step_ms = self._host_ms = 0.0
        self._pace: dict[int, float] = {}  # device milliseconds of a decode step by number of sequences
        self.max_repeats = 8 if overlap else 1
        self._balanced = True

    # --- requests --------------------------------------------------------------------------------

    def add(self, requests: Iterable[Request]) -> None:
        """Queue requests; one that can never run is answered with an ERROR output by the next step."""
        for request in requests:
            sequence = None
            try:
                sequence = self.scheduler.add(request)
                self.constraints.add(sequence)
            except HeadraceError as error:
                if sequence is not None:
                    self.scheduler.finish(sequence, FinishReason.ERROR)
                self._refused.append(
                    Output(
                        request.id,
                        finish_reason=FinishReason.ERROR,
                        error=error.message,
                        error_code=type(error).code,
                        error_param=error.param or "",
                    )
                )

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drop these requests; unknown ids are ignored."""
        for request_id in request_ids:
            sequence = self.scheduler.abort(request_id)
            if sequence is not None:
                self._counts["aborted"] += sequence.num_output
                self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        self._prompt_logprobs.pop(sequence.id, None)
        self.constraints.remove(sequence)

    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self.scheduler.sequences or self._refused or self._previous)

    # --- one step --------------------------------------------------------------------------------

    def step(self) -> list[Output]:
        """Advance by one step; the outputs that the host learned of."""
        began = time.perf_counter()
        outputs, self._refused = self._refused, []
        for sequence in self.scheduler.expire():
            self._forget(sequence)
            outputs.append(
                Output(sequence.id, finish_reason=FinishReason.ABORT, error="the request's deadline passed")
            )
        outputs += self._refuse_constraints()
        plan = self.scheduler.schedule()
        if plan is not None:
            self._repeat(plan)
        outputs += self._step_overlapped(plan) if self.overlap else self._step_plain(plan)
        if plan is None and not outputs:
            time.sleep(_PAUSE)  # all that is here waits for a grammar
        if plan is not None:
            self._counts["steps"] += plan.repeats
            self._balanced = False
            elapsed = (time.perf_counter() - began) * 1e3 / plan.repeats
            self._step_ms += (elapsed - self._step_ms) * _SMOOTHING
        return outputs

    def _repeat(self, plan: StepPlan) -> None:
        """Several decode steps for one turn of the host, as many as take no time that anybody notices."""
        pace = self._pace.get(len(plan.chunks)) if self.max_repeats > 1 else None
        if pace is not None:
            times = min(self.runner.most_repeats(plan), self.max_repeats, int(_UNNOTICED_MS / pace))
            if times > 1:
                self.scheduler.repeat(plan, times)

    def _step_plain(self, plan: StepPlan | None) -> list[Output]:
        if plan is None:
            return []
        launched = self._run(self._prepare(plan))
        return self._finish(plan, self._sample(launched, self.constraints.begin(plan, ahead=False)))

    def _step_overlapped(self, plan: StepPlan | None) -> list[Output]:
        """The same, with the device one step ahead.

        Where a step's sampling needs the tokens of the step before, its forward pass is launched without it. Grammars
        move on as soon as those tokens are there, and masks are made in another thread while the host settles, tells,
        schedules and packs; sampling is launched before the next forward pass, when that has been packed.
        """
        step = None if plan is None else self._prepare(plan)
        if self._previous is not None and self._pending is not None:
            before, running = self._previous
            self._previous = (before, self._sample(running, self._pending))
        self._pending = None
        launched = None if step is None else self._run(step)
        later = plan is not None and plan.needs_history
        if launched is not None and not later:
            launched = self._sample(launched, None)
        outputs: list[Output] = []
        if self._previous is not None:
            before, running = self._previous
            result = self._wait(before, running)
            if plan is not None and launched is not None and later and not plan.needs_output:
                launched, later = self._sample_later(plan, launched), False
            outputs = self._settle(before, result) if isinstance(result, StepResult) else result
        if plan is not None and launched is not None and later:
            launched = self._sample_later(plan, launched)
        self._previous = None if plan is None or launched is None else (plan, launched)
        return outputs

    def _prepare(self, plan: StepPlan) -> Step:
        began = time.perf_counter()
        step = self.runner.prepare(plan)
        self._host_ms += ((time.perf_counter() - began) * 1e3 - self._host_ms) * _SMOOTHING
        return step

    def _run(self, step: Step) -> Future[Step]:
        return self._device.submit(lambda: self.runner.run(step))

    def _sample(self, launched: Future[Step], masks: PendingMasks | None) -> Future[Step]:
        """Sampling behind a forward pass; waits for the masks."""
        taken = None if masks is None else masks.take()
        return self._device.submit(lambda: self.runner.sample(launched.result(), taken))

    def _sample_later(self, plan: StepPlan, launched: Future[Step]) -> Future[Step]:
        """Begin the masks that sampling needs; without any it is launched now."""
        self._pending = self.constraints.begin(plan, ahead=True)
        return self._sample(launched, None) if self._pending is None else launched

    def _refuse_constraints(self) -> list[Output]:
        """Grammars that could not be compiled end their own request."""
        outputs = []
        for sequence, message in self.constraints.refused():
            self.scheduler.finish(sequence, FinishReason.ERROR)
            self._forget(sequence)
            code = InvalidRequest.code
            outputs.append(
                Output(sequence.id, finish_reason=FinishReason.ERROR, error=message, error_code=code)
            )
        return outputs

    def _finish(self, plan: StepPlan, launched: Future[Step]) -> list[Output]:
        """Wait for a step and settle it."""
        result = self._wait(plan, launched)
        return self._settle(plan, result) if isinstance(result, StepResult) else result

    def _wait(self, plan: StepPlan, launched: Future[Step]) -> StepResult | list[Output]:
        """A step's tokens, known to its grammars too. One that broke costs its own sequences: their last outputs."""
        try:
            result = launched.result().result()
        except torch.AcceleratorError:
            raise  # the device's context is lost; the process must be replaced
        except Exception as error:
            logger.exception("a step with %d sequences failed", len(plan.chunks))
            message = f"the step failed: {type(error).__name__}: {error}"
            failed = self.scheduler.fail(plan)
            for sequence in failed:
                self._forget(sequence)
            return [Output(s.id, finish_reason=FinishReason.ERROR, error=message) for s in failed]
        if plan.repeats == 1:  # else nobody in it has a grammar
            self.constraints.advance(plan, result.tokens)
        if result.device_ms is not None and plan.num_tokens == len(plan.chunks):
            self._pace[len(plan.chunks)] = result.device_ms / plan.repeats
        return result

    def _settle(self, plan: StepPlan, result: StepResult) -> list[Output]:
        for request_id, (start, entries) in result.prompt_logprobs.items():
            sequence = self.scheduler.sequences.get(request_id)
            if sequence is not None and not sequence.num_output:  # else it was preempted, and they are told
                self._prompt_logprobs.setdefault(request_id, {}).update(enumerate(entries, start))
        index = {id(chunk.sequence): i for i, chunk in enumerate(plan.sampling)} if result.logprobs else {}
        outputs = []
        for sequence in self.scheduler.settle(plan, result.tokens, self.constraints.judge):
            ended = sequence.finish_reason
            failure = self.constraints.failure(sequence) if ended is FinishReason.ERROR else None
            logprobs = result.logprobs.get(index.get(id(sequence), -1))
            outputs.append(
                self._output(sequence, logprobs) if failure is None else self._failure(sequence, *failure)
            )
            if ended is not None:
                self._forget(sequence)
        return outputs

    def _failure(self, sequence: Sequence, gave_up: str, too_complex: bool) -> Output:
        code = param = ""
        if too_complex:
            message = f"the grammar needs more work at one token than allowed; make it simpler: {gave_up}"
            code, param = InvalidRequest.code, "response_format"
        elif gave_up:
            message = f"the grammar gave up: {gave_up}"
        else:
            constrained = sequence.sampling.constraint is not None
            message = "the model's logits were not finite" + (" or left the grammar" if constrained else "")
        return Output(
            sequence.id,
            finish_reason=FinishReason.ERROR,
            error=message,
            error_code=code,
            error_param=param,
        )

    def _output(self, sequence: Sequence, logprobs: TokenLogprobs | None) -> Output:
        tokens = tuple(sequence.token_ids[sequence.num_prompt + sequence.num_told :])
        token = tokens[-1]
        first = sequence.num_told == 0
        sequence.num_told += len(tokens)
        self._counts["output"] += len(tokens)
        reason = sequence.finish_reason
        if not first and logprobs is None and reason is None:
            return Output(sequence.id, tokens)
        prompt: tuple[TokenLogprobs, ...] = ()
        if first:
            self._counts["prompt"] += sequence.num_prompt
            entries = self._prompt_logprobs.pop(sequence.id, {})
            prompt = tuple(entries[i] for i in sorted(entries))
        return Output(
            sequence.id,
            tokens,
            finish_reason=reason,
            logprobs=() if logprobs is None else (logprobs,),
            stop_token=token if token in sequence.stop_ids and reason is FinishReason.STOP else None,
            num_cached_tokens=max(sequence.num_cached, 0) if first else 0,
            prompt_logprobs=prompt,
        )

    # --- state -----------------------------------------------------------------------------------

    def idle(self) -> bool:
        """Called when there is no work: the books must balance now. Then another graph is captured, if one is left."""
        if not self._balanced:
            self._balanced = True
            try:
                self.scheduler.check()
            except AccountError:
                logger.exception("block account violated; rebuilt from its owners")
        return self.runner.prepare_next()

    def stats(self) -> CoreStats:
        """Counters and gauges."""
        account = self.scheduler.pool.account()
        return CoreStats(
            steps=self._counts["steps"],
            num_running=len(self.scheduler.running),
            num_waiting=self.scheduler.num_waiting,
            num_preemptions=self.scheduler.num_preemptions,
            blocks_total=account.total,
            blocks_used=account.owned,
            blocks_cached=account.cached,
            prefix_queries=self.scheduler.prefix_queries,
            prefix_hits=self.scheduler.prefix_hits,
            prompt_tokens=self._counts["prompt"],
            output_tokens=self._counts["output"],
            aborted_tokens=self._counts["aborted"],
            step_ms=self._step_ms,
            host_ms=self._host_ms,
        )

    def close(self) -> None:
        """Stop the threads, and keep no device memory beyond the model's life."""
        self._device.close()
        self.constraints.close()
        forget_workspaces(self.runner.device)
