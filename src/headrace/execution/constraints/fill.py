"""Masks of many grammars at once, outside Python's lock, and those of slow grammars beside the loop."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Any

import numpy as np

from headrace.execution.constraints.compiler import SLOW_SECONDS, mask_threads
from headrace.execution.constraints.constraint import Constraint, reason

__all__ = ["MaskFiller"]

_FEW = 2  # so many are done at once without other threads
_SUSPECT_SECONDS = 3 * SLOW_SECONDS
_SEARCH_EVERY = 1.0  # seconds


class MaskFiller:
    """Moves matchers on and fills masks.

    A step is as slow as its slowest mask. A grammar whose mask was seen to take long (llguidance bounds one to some
    tens of milliseconds) is marked slow: from then on its masks are made by a thread of their own, and its sequence
    sits out until the next one is there; that ends when it has been quick for a while.
    """

    def __init__(self, vocab_size: int) -> None:
        self.words = -(-vocab_size // 32)
        self._executor: Any = None
        self._beside: ThreadPoolExecutor | None = None
        self._ahead: ThreadPoolExecutor | None = None
        self._search = False
        self._searched = 0.0

    def consume(self, jobs: list[tuple[Any, int]]) -> None:
        """Each matcher takes its token; one that does not allow it is in error afterwards."""
        if len(jobs) <= _FEW:
            for matcher, token in jobs:
                matcher.consume_token(token)
        else:
            self._parallel().consume_token_par(jobs)

    def prefetch(self, constraint: Constraint) -> None:
        """Begin the next mask of a slow grammar."""
        if self._beside is None:
            self._beside = ThreadPoolExecutor(1, "headrace-slow-mask")
        constraint.prefetch = self._beside.submit(self._mask, constraint)

    def _mask(self, constraint: Constraint) -> np.ndarray:
        bits = np.zeros(self.words, np.int32)
        began = time.thread_time()
        constraint.matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        constraint.note(time.thread_time() - began < SLOW_SECONDS)
        return bits

    def begin(self, constraints: list[Constraint], bits: np.ndarray) -> Future[None]:
        """`fill` in a thread of its own; until it is done nobody else may touch these matchers."""
        if self._ahead is None:
            self._ahead = ThreadPoolExecutor(1, "headrace-masks")
        running = Event()

        def work() -> None:
            running.set()
            self.fill(constraints, bits)

        future = self._ahead.submit(work)
        running.wait()  # hands Python's lock over; it comes back as soon as the work is outside of Python
        return future

    def fill(self, constraints: list[Constraint], bits: np.ndarray) -> None:
        """Allowed tokens of each constraint into its row of ``bits`` (int32 [M, words]); none after an error."""
        jobs = []
        for i, one in enumerate(constraints):
            if not one.needs_mask:
                bits[i] = 0
            elif one.prefetch is not None:
                bits[i], one.prefetch = one.prefetch.result(), None
            else:
                jobs.append((one.matcher, i))
        began = time.perf_counter()
        if self._search:
            self._one_by_one(constraints, bits)
        elif len(jobs) == 1:
            matcher, i = jobs[0]
            matcher.unsafe_compute_mask_ptr(bits[i].ctypes.data, bits.strides[0])
        elif jobs:
            self._parallel().unsafe_compute_mask_ptr(jobs, bits.ctypes.data, bits.strides[0], len(bits))
        now = time.perf_counter()
        self._search = now - began > _SUSPECT_SECONDS and now - self._searched > _SEARCH_EVERY
        unsigned = bits.view(np.uint32)
        for i, one in enumerate(constraints):
            if one.matcher.is_error():
                one.error, bits[i] = reason(one.matcher), 0
            more = one.forced if one.forced is not None else one.head_begins
            if more is not None:
                unsigned[i, more // 32] |= np.uint32(1 << more % 32)

    def _one_by_one(self, constraints: list[Constraint], bits: np.ndarray) -> None:
        """Fill, and find out which are slow."""
        for i, one in enumerate(constraints):
            if one.slow or not one.needs_mask:
                continue
            began = time.thread_time()  # what others do to the clock is not its fault
            one.matcher.unsafe_compute_mask_ptr(bits[i].ctypes.data, bits.strides[0])
            one.slow = time.thread_time() - began > SLOW_SECONDS
        self._searched = time.perf_counter()

    def _parallel(self) -> Any:
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor(mask_threads())
        return self._executor

    def close(self) -> None:
        """Stop the threads."""
        for pool in (self._beside, self._ahead):
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)
