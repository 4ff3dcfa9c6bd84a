"""Grammars are compiled in bounded workers, cached by content, and copied for each sequence."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any

from headrace.errors import HeadraceError, InvalidRequest
from headrace.execution.constraints.grammar import LIMITS, grammar_of
from headrace.types import ConstraintSpec

__all__ = ["Constraint", "ConstraintCompiler"]

logger = logging.getLogger("headrace.constraints")

_CACHED = 256


class Constraint:
    """One sequence's place in its grammar.

    Args:
        matcher: llguidance's LLMatcher, this sequence's own.
        spec: what it follows, and the head that is free.
    """

    def __init__(self, matcher: Any, spec: ConstraintSpec) -> None:
        self.matcher = matcher
        self._any = spec.kind == "text"
        self._close = list(spec.free_until)
        self._open = spec.free_from if self._close else None
        self._budget = spec.free_tokens
        self._recent: list[int] = []
        self._num_free = 0

    @property
    def in_head(self) -> bool:
        """Whether the free head goes on."""
        return bool(self._close) and self._open is None

    @property
    def forced(self) -> int | None:
        """The only token allowed next, where the head is over its limit."""
        if not self.in_head or self._budget is None or self._num_free < self._budget:
            return None
        known = next(
            n
            for n in range(len(self._close), -1, -1)
            if self._recent[len(self._recent) - n :] == self._close[:n]
        )
        return self._close[known]

    @property
    def head_begins(self) -> int | None:
        """A token that is allowed beside the grammar's: it begins a head."""
        return self._open

    @property
    def active(self) -> bool:
        """Whether the next token is constrained."""
        return self.forced is not None if self.in_head else not self._any or self._open is not None

    @property
    def complete(self) -> bool:
        """Nothing more may follow."""
        return not self._close and not self._any and bool(self.matcher.is_stopped())

    def check(self) -> None:
        """Raises HeadraceError when the grammar gave up (a limit of its own)."""
        if self.matcher.is_error():
            raise HeadraceError(
                f"the grammar gave up: {self.matcher.get_error().strip()}", code="constraint_failed"
            )

    def advance(self, token: int) -> None:
        """Take a sampled token. Raises HeadraceError when the grammar does not allow it: a bug."""
        if self._open is not None:
            begun, self._open = token == self._open, None
            if begun:
                return
            self._close = []
        if self._close:
            self._num_free += 1
            self._recent = [*self._recent, token][-len(self._close) :]
            if self._recent == self._close:
                self._close = []
        elif not self._any and not self.matcher.consume_token(token):
            raise HeadraceError(
                f"token {token} does not fit the grammar: {self.matcher.get_error().strip()}",
                code="constraint_failed",
            )


class ConstraintCompiler:
    """Compiles specs for one vocabulary.

    Args:
        tokenizer_json: gives the text of tokenizer.json, asked for once, on the first constraint.
        vocab_size: columns of the logits.
        eos_ids: tokens that the grammar's end allows.
        workers: compilations at the same time; others wait.
    """

    def __init__(
        self,
        tokenizer_json: Callable[[], str],
        *,
        vocab_size: int,
        eos_ids: tuple[int, ...],
        workers: int = 1,
    ) -> None:
        self._tokenizer_json = tokenizer_json
        self.vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._pool = ThreadPoolExecutor(workers, "headrace-grammar")
        self._tokenizer: Any = None
        self._cache: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._lock = Lock()

    def submit(self, spec: ConstraintSpec) -> Future[Constraint]:
        """Compile, or copy what is cached. The future raises InvalidRequest when the grammar is refused."""
        with self._lock:
            known = self._cache.get((spec.kind, spec.text))
            if known is not None:
                self._cache.move_to_end((spec.kind, spec.text))
        if known is not None:
            done: Future[Constraint] = Future()
            done.set_result(Constraint(known.deep_copy(), spec))
            return done
        return self._pool.submit(self._compile, spec)

    def close(self) -> None:
        """Drop what is still waiting."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, spec: ConstraintSpec) -> Constraint:
        from llguidance import LLMatcher, LLParserLimits

        matcher = LLMatcher(
            self._vocabulary(), grammar_of(spec), log_level=0, limits=LLParserLimits(**LIMITS)
        )
        if matcher.is_error():
            raise InvalidRequest(
                f"the {spec.kind} cannot be enforced: {matcher.get_error().strip()}", param="response_format"
            )
        with self._lock:
            self._cache[spec.kind, spec.text] = matcher
            while len(self._cache) > _CACHED:
                self._cache.popitem(last=False)
        return Constraint(matcher.deep_copy(), spec)

    def _vocabulary(self) -> Any:
        if self._tokenizer is None:
            from llguidance import LLTokenizer

            self._tokenizer = LLTokenizer(
                self._tokenizer_json(), n_vocab=self.vocab_size, eos_token=list(self._eos_ids) or None
            )
        return self._tokenizer
