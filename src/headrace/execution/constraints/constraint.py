"""One sequence's place in its grammar."""

from __future__ import annotations

from concurrent.futures import Future
from threading import Lock
from typing import Any

import numpy as np

from headrace.types import ConstraintSpec

__all__ = ["Base", "Constraint", "reason"]

_QUICK_AGAIN = 16  # masks in a row


def reason(matcher: Any) -> str:
    """What llguidance says of a matcher in error, in one line."""
    return " ".join(str(matcher.get_error()).replace("<non-verbose/>", "").split()) or "no reason given"


class Base:
    """A compiled grammar that sequences hold copies of; the copies share what they learn, under one lock.

    Attributes:
        num_users: copies in use.
    """

    def __init__(self, matcher: Any) -> None:
        self.matcher = matcher
        self.num_users = 0
        self._lock = Lock()

    def count(self, change: int) -> None:
        """One user more, or less."""
        with self._lock:
            self.num_users += change


class Constraint:
    """One sequence's place in its grammar.

    Args:
        matcher: llguidance's LLMatcher, this sequence's own.
        spec: what it follows, and the head that is free.
        slow: its masks take long enough to hold up a step.
        base: what the matcher is a copy of.

    Attributes:
        error: why the grammar gave up (a limit of its own, or a token that it does not allow); empty: it did not.
        stopped: its matcher takes nothing more.
        prefetch: the next mask (int32 words), made beside the loop because this grammar is slow.
    """

    def __init__(
        self, matcher: Any, spec: ConstraintSpec, *, slow: bool = False, base: Base | None = None
    ) -> None:
        self.matcher = matcher
        self._base = base
        if base is not None:
            base.count(1)
        self.slow = slow
        self.error = ""
        self.stopped = False
        self.prefetch: Future[np.ndarray] | None = None
        self._num_quick = 0
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
    def needs_mask(self) -> bool:
        """Whether the grammar has a say in the next token."""
        return self.active and self.forced is None

    @property
    def complete(self) -> bool:
        """Nothing more may follow."""
        return self.stopped and not self.error

    @property
    def too_complex(self) -> bool:
        """Whether it gave up at a limit, which is its author's affair; else a token came that it does not allow."""
        return bool(self.error) and "satisfy the grammar" not in self.error

    def leave(self) -> None:
        """Its sequence has ended."""
        if self._base is not None:
            self._base.count(-1)
            self._base = None

    def look(self) -> None:
        """Take note of the matcher's state; not while another thread works with it."""
        if self.matcher.is_error():
            self.error = reason(self.matcher)
        self.stopped = not self._close and not self._any and bool(self.matcher.is_stopped())

    def note(self, quick: bool) -> None:
        """How long the latest mask of a slow grammar took."""
        self._num_quick = self._num_quick + 1 if quick else 0
        self.slow = self._num_quick < _QUICK_AGAIN

    def read(self, token: int) -> bool:
        """Take a sampled token; True when it is one that the matcher must consume."""
        if self._open is not None:
            begun, self._open = token == self._open, None
            if begun:
                return False
            self._close = []
        if self._close:
            self._num_free += 1
            self._recent = [*self._recent, token][-len(self._close) :]
            if self._recent == self._close:
                self._close = []
            return False
        return not self._any
