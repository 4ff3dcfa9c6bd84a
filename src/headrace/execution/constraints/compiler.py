"""Grammars are compiled beside the loop, cached by content, and copied for each sequence."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Lock
from typing import Any

import msgspec
import numpy as np

from headrace.errors import HeadraceError, InvalidRequest
from headrace.execution.constraints.constraint import Constraint, reason
from headrace.execution.constraints.grammar import LIMITS, grammar_of
from headrace.execution.constraints.judge import Judge
from headrace.execution.constraints.priority import stand_back
from headrace.types import ConstraintSpec

__all__ = ["SLOW_SECONDS", "Compilation", "ConstraintCompiler"]

logger = logging.getLogger("headrace.constraints")

_CACHED = 256
_CACHED_BYTES = 1 << 30
_HEAVY_MS = 25.0  # beyond it a grammar is compiled only while the processors have nothing else to do
_MOST_STUCK = 4
SLOW_SECONDS = 0.004  # a mask that takes longer is made beside the loop


@dataclass(slots=True, eq=False)
class Compilation:
    """A grammar on its way.

    Attributes:
        spec: what is compiled.
        future: gives the Constraint; raises InvalidRequest when the grammar is refused.
        deadline: time.monotonic() after which nobody waits for it; None: it waits for its turn, or is done.
        lane: where it is compiled.
        grammar: llguidance's form of it, once that is known.
    """

    spec: ConstraintSpec
    future: Future[Constraint] = field(default_factory=Future)
    deadline: float | None = None
    lane: _Lane | None = None
    grammar: str = ""

    @property
    def late(self) -> bool:
        """Whether it has taken too long."""
        return self.deadline is not None and time.monotonic() > self.deadline


class _Lane:
    """A thread that works through a queue, and that can be replaced when it does not come back.

    Args:
        work: what to do with each compilation.
        prepare: called first on every thread of the lane.
    """

    def __init__(
        self, work: Callable[[Compilation], None], prepare: Callable[[], None] | None = None
    ) -> None:
        self._work = work
        self._prepare = prepare
        self._queue: SimpleQueue[Compilation | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self.num_stuck = 0

    def put(self, one: Compilation) -> None:
        one.lane = self
        self._queue.put(one)
        if self._thread is None:
            self.replace()

    def replace(self) -> None:
        """Go on with a new thread; the old one ends when it comes back."""
        self._thread = threading.Thread(target=self._run, name="headrace-grammar", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._queue.put(None)

    def _run(self) -> None:
        if self._prepare is not None:
            self._prepare()
        me = threading.current_thread()
        while (one := self._queue.get()) is not None:
            self._work(one)
            if self._thread is not me:
                self.num_stuck -= 1
                return


@dataclass(frozen=True, slots=True)
class _Compiled:
    matcher: Any
    slow: bool
    bytes: int


class ConstraintCompiler:
    """Compiles specs for one vocabulary.

    What a front end has not had judged is judged here first, in a child process with limits. What is judged costs
    about as much here as it did there, and is bounded by llguidance's own limits besides; a compilation that does
    not come back all the same is given up, and its thread with it.

    Args:
        tokenizer_json: gives the text of tokenizer.json, asked for once, on the first constraint.
        vocab_size: columns of the logits.
        eos_ids: tokens that the grammar's end allows.
        seconds: that one compilation may take, on the clock.
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
        self._judge = Judge()
        self._quick = _Lane(self._compile_one)
        self._heavy = _Lane(self._compile_one, stand_back)
        self._unjudged = _Lane(self._judge_one)
        self._tokenizer: Any = None
        self._cache: OrderedDict[tuple[str, str], _Compiled] = OrderedDict()
        self._lock = Lock()
        self._tokenizer_lock = Lock()

    def submit(self, spec: ConstraintSpec) -> Compilation:
        """Compile, or copy what is cached."""
        one = Compilation(spec)
        with self._lock:
            known = self._cache.get((spec.kind, spec.text))
            if known is not None:
                self._cache.move_to_end((spec.kind, spec.text))
        if known is not None:
            one.future.set_result(Constraint(known.matcher.deep_copy(), spec, known.slow))
        elif self._quick.num_stuck + self._heavy.num_stuck > _MOST_STUCK:
            one.future.set_exception(HeadraceError("no grammar can be compiled: earlier ones hang"))
        elif spec.judged is None and spec.kind != "text":
            self._unjudged.put(one)
        else:
            self._quick.put(one)
        return one

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
        one.deadline = time.monotonic() + self._seconds
        try:
            judged = one.spec.judged
            if not one.grammar:
                # Text work holds Python's lock, so it is not for a thread that stands back.
                one.grammar = grammar_of(one.spec)
                if judged is not None and judged.cpu_ms > _HEAVY_MS and self._tokenizer is not None:
                    one.deadline = None
                    self._heavy.put(one)
                    return
            one.future.set_result(self._compile(one.spec, one.grammar))
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
        known = _Compiled(matcher, slow, spec.judged.bytes if spec.judged is not None else 0)
        with self._lock:
            self._cache[spec.kind, spec.text] = known
            while len(self._cache) > _CACHED or (
                len(self._cache) > 1 and sum(one.bytes for one in self._cache.values()) > _CACHED_BYTES
            ):
                self._cache.popitem(last=False)
        return Constraint(matcher.deep_copy(), spec, slow)

    def _vocabulary(self) -> Any:
        with self._tokenizer_lock:
            if self._tokenizer is None:
                from llguidance import LLTokenizer

                self._tokenizer = LLTokenizer(
                    self._tokenizer_json(), n_vocab=self.vocab_size, eos_token=list(self._eos_ids) or None
                )
            return self._tokenizer
