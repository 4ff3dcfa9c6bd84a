"""Grammars are compiled beside the loop, cached by content, and copied for each sequence."""

from __future__ import annotations

import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any

import msgspec
import numpy as np

from headrace.errors import HeadraceError, InvalidRequest
from headrace.execution.constraints.constraint import Base, Constraint, reason
from headrace.execution.constraints.grammar import LIMITS, grammar_of
from headrace.execution.constraints.judge import Judge
from headrace.execution.constraints.lane import Compilation, Lane
from headrace.execution.constraints.priority import stand_back
from headrace.types import ConstraintSpec

__all__ = ["SLOW_SECONDS", "ConstraintCompiler", "mask_threads"]

logger = logging.getLogger("headrace.constraints")

_CACHED = 256
_CACHED_BYTES = 1 << 30
_HEAVY_MS = 25.0  # beyond it a grammar is compiled only while the processors have nothing else to do
_HEAVY_PATIENCE = 4.0  # for them on the clock, times that of others: the processors may have much to do
_MOST_STUCK = 4
_USERS = 16  # of one base, before the grammar is compiled once more; a new base must learn everything again
_REPEATED_BYTES = 16 << 20
SLOW_SECONDS = 0.004  # a mask that takes longer is made beside the loop


@dataclass(slots=True)
class _Compiled:
    """A grammar in the cache.

    Attributes:
        bases: compiled again and again, since the copies of one matcher lock each other out while masks are made.
        slow: its first mask took long.
        bytes: of one matcher.
    """

    bases: list[Base]
    slow: bool
    bytes: int

    def copy(self, spec: ConstraintSpec) -> Constraint:
        """For one more sequence, of the base with the fewest users."""
        base = min(self.bases, key=lambda one: one.num_users)
        return Constraint(base.matcher.deep_copy(), spec, slow=self.slow, base=base)


class ConstraintCompiler:
    """Compiles specs for one vocabulary.

    What a front end has not had judged is judged here first, in a child process with limits. What is judged costs
    about as much here as it did there, and is bounded by llguidance's own limits besides; a compilation that does
    not come back all the same is given up, and its thread with it.

    Args:
        tokenizer_json: gives the text of tokenizer.json, asked for once, on the first constraint.
        vocab_size: columns of the logits.
        eos_ids: tokens that the grammar's end allows.
        seconds: that one compilation may take, on the clock; four times as long where it stands back.
    """

    def __init__(
        self,
        tokenizer_json: Callable[[], str],
        *,
        vocab_size: int,
        eos_ids: tuple[int, ...],
        seconds: float = 30.0,
    ) -> None:
        self._tokenizer_json = tokenizer_json
        self.vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._seconds = seconds
        self._most_bases = mask_threads()  # of one grammar
        self._judge = Judge()
        self._quick = Lane(self._compile_one)
        self._heavy = Lane(self._compile_one, stand_back)
        self._unjudged = Lane(self._judge_one)
        self._tokenizer: Any = None
        self._cache: OrderedDict[tuple[str, str], _Compiled] = OrderedDict()
        self._lock = Lock()
        self._tokenizer_lock = Lock()

    def submit(self, spec: ConstraintSpec) -> Compilation:
        """Compile, or copy what is cached."""
        one = Compilation(spec)
        with self._lock:
            found = self._from_cache(one)
        if found is not None:
            one.future.set_result(found)
        elif self._quick.num_stuck + self._heavy.num_stuck > _MOST_STUCK:
            one.future.set_exception(HeadraceError("no grammar can be compiled: earlier ones hang"))
        elif spec.judged is None and spec.kind != "text":
            self._unjudged.put(one)
        else:
            self._quick.put(one)
        return one

    def _from_cache(self, one: Compilation) -> Constraint | None:
        """A copy, unless the grammar is new, or all its bases have users enough. Under the lock."""
        key = (one.spec.kind, one.spec.text)
        known = self._cache.get(key)
        if known is None:
            return None
        self._cache.move_to_end(key)
        full = all(base.num_users >= _USERS for base in known.bases)
        room = len(known.bases) < self._most_bases and known.bytes < _REPEATED_BYTES and not known.slow
        return None if full and room and not self._is_heavy(one.spec) else known.copy(one.spec)

    def _is_heavy(self, spec: ConstraintSpec) -> bool:
        return spec.judged is not None and spec.judged.cpu_ms > _HEAVY_MS and self._tokenizer is not None

    def give_up(self, one: Compilation) -> None:
        """Leave a compilation that is late to itself: those that wait behind it get another thread."""
        if one.lane is not None:
            one.lane.num_stuck += 1
            one.lane.replace()

    def close(self) -> None:
        """Drop what is still waiting."""
        self._judge.close()
        for lane in (self._unjudged, self._quick, self._heavy):
            lane.close()

    def _judge_one(self, one: Compilation) -> None:
        if one.future.cancelled():
            return
        try:
            one.spec = msgspec.structs.replace(one.spec, judged=self._judge.check(one.spec))
        except Exception as error:
            if one.future.set_running_or_notify_cancel():
                one.future.set_exception(error)
            return
        self._quick.put(one)

    def _compile_one(self, one: Compilation) -> None:
        if not one.grammar and not one.future.set_running_or_notify_cancel():
            return
        stood_back = bool(one.grammar)
        one.deadline = time.monotonic() + self._seconds * (_HEAVY_PATIENCE if stood_back else 1.0)
        try:
            with self._lock:
                found = self._from_cache(one)  # it may have come while this waited
            if found is None and not stood_back:
                # Text work holds Python's lock, so it is not for a thread that stands back.
                one.grammar = grammar_of(one.spec)
                if self._is_heavy(one.spec):
                    one.deadline = None
                    self._heavy.put(one)
                    return
            one.future.set_result(found or self._compile(one.spec, one.grammar))
        except Exception as error:
            one.future.set_exception(error)
        one.deadline = None

    def _compile(self, spec: ConstraintSpec, grammar: str) -> Constraint:
        from llguidance import LLMatcher, LLParserLimits

        limits, first = LLParserLimits(**LIMITS), np.zeros(-(-self.vocab_size // 32), np.int32)
        matcher = LLMatcher(self._vocabulary(), grammar, log_level=0, limits=limits)
        began = time.thread_time()
        if not matcher.is_error():
            # Made here, not in a step; the copies share what the matcher learns of its first mask.
            matcher.unsafe_compute_mask_ptr(first.ctypes.data, first.nbytes)
        if matcher.is_error():
            raise InvalidRequest(
                f"the {spec.kind} cannot be enforced: {reason(matcher)}", param="response_format"
            )
        slow = time.thread_time() - began > 4 * SLOW_SECONDS
        bytes_ = spec.judged.bytes if spec.judged is not None else 0
        base = Base(matcher)
        with self._lock:
            known = self._cache.setdefault((spec.kind, spec.text), _Compiled([], slow, bytes_))
            known.bases.append(base)
            while len(self._cache) > _CACHED or (
                len(self._cache) > 1
                and sum(one.bytes * len(one.bases) for one in self._cache.values()) > _CACHED_BYTES
            ):
                self._cache.popitem(last=False)
            return known.copy(spec)

    def _vocabulary(self) -> Any:
        with self._tokenizer_lock:
            if self._tokenizer is None:
                from llguidance import LLTokenizer

                self._tokenizer = LLTokenizer(
                    self._tokenizer_json(), n_vocab=self.vocab_size, eos_token=list(self._eos_ids) or None
                )
            return self._tokenizer


def mask_threads() -> int:
    """Threads that make masks at the same time: most of the processors, as many as it takes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores * 3 // 4, 16))
