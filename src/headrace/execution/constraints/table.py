"""The constraints of the sequences that live in a core."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.errors import HeadraceError, InvalidRequest
from headrace.execution.constraints.compiler import ConstraintCompiler
from headrace.execution.constraints.constraint import Constraint
from headrace.execution.constraints.fill import MaskFiller
from headrace.execution.constraints.lane import Compilation
from headrace.execution.sampler import Masks
from headrace.scheduling.plan import StepPlan
from headrace.scheduling.sequence import Sequence, Status
from headrace.types import FinishReason

__all__ = ["ConstraintTable", "PendingMasks"]


class ConstraintTable:
    """Which sequence follows which grammar, from compilation to its end.

    Args:
        compiler: None refuses constraints.
        device: where logits are.
    """

    def __init__(self, compiler: ConstraintCompiler | None, device: torch.device) -> None:
        self.compiler = compiler
        self._device = device
        self._filler = MaskFiller(compiler.vocab_size if compiler is not None else 0)
        self._buffers = _Buffers(pinned=device.type == "cuda")
        self._compiling: dict[str, tuple[Sequence, Compilation]] = {}
        self._live: dict[str, Constraint] = {}

    def add(self, sequence: Sequence) -> None:
        """Begin to compile the sequence's grammar, if it has one."""
        spec = sequence.sampling.constraint
        if spec is None:
            return
        if self.compiler is None:
            raise InvalidRequest("this engine was built without constraints", param="response_format")
        self._compiling[sequence.id] = (sequence, self.compiler.submit(spec))

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that ended."""
        ended = self._live.pop(sequence.id, None)
        if ended is not None:
            ended.leave()
        compiling = self._compiling.pop(sequence.id, None)
        if compiling is not None and not compiling[1].future.cancel():
            compiling[1].future.add_done_callback(_leave)

    def is_ready(self, sequence: Sequence) -> bool:
        """Whether the sequence may run in the next step."""
        if sequence.id in self._compiling:
            return False
        constraint = self._live.get(sequence.id)
        if constraint is None or not constraint.slow or not constraint.needs_mask:
            return True
        if sequence.in_flight:
            return False
        if constraint.prefetch is None:
            self._filler.prefetch(constraint)
            return False
        return constraint.prefetch.done()

    def refused(self) -> list[tuple[Sequence, str]]:
        """Take note of finished compilations; those that failed, with the reason."""
        failed = []
        for request_id, (sequence, compilation) in list(self._compiling.items()):
            future = compilation.future
            if not future.done():
                if compilation.late and self.compiler is not None:
                    self.compiler.give_up(compilation)
                    del self._compiling[request_id]
                    failed.append((sequence, "the grammar took too long to compile; make it smaller"))
                continue
            del self._compiling[request_id]
            error = future.exception()
            if error is None:
                self._live[request_id] = future.result()
            else:
                failed.append((sequence, error.message if isinstance(error, HeadraceError) else repr(error)))
        return failed

    def begin(self, plan: StepPlan, *, ahead: bool) -> PendingMasks | None:
        """Start on the masks of the plan's constrained rows; None: it has none.

        Args:
            ahead: in another thread. Until they are taken, these grammars are not to be touched.
        """
        live = self._live
        found = [
            (row, constraint)
            for row, chunk in enumerate(plan.sampling if live else ())
            if (constraint := live.get(chunk.sequence.id)) is not None and constraint.active
        ]
        if not found:
            return None
        rows, words = len(found), self._filler.words
        host = self._buffers.take(rows * words + rows)  # bits, then row numbers
        flat = host.numpy()
        flat[rows * words :] = [row for row, _ in found]
        constraints = [constraint for _, constraint in found]
        bits = flat[: rows * words].reshape(rows, words)
        filled = None
        if ahead:
            filled = self._filler.begin(constraints, bits)
        else:
            self._filler.fill(constraints, bits)
        return PendingMasks(host, rows, words, self._device, filled)

    def advance(self, plan: StepPlan, tokens: list[int]) -> None:
        """A step's tokens are known: all grammars move on, before anything else is settled."""
        live = self._live
        if not live:
            return
        jobs, moved = [], []
        for chunk, token in zip(plan.sampling, tokens, strict=True):
            constraint = live.get(chunk.sequence.id)
            if constraint is None or token < 0 or chunk.sequence.status is Status.FINISHED:
                continue
            if constraint.read(token):
                jobs.append((constraint.matcher, token))
                moved.append(constraint)
        self._filler.consume(jobs)
        for constraint in moved:
            constraint.look()

    def judge(self, sequence: Sequence) -> None:
        """After a settled token: a complete grammar ends its sequence, and so does one that gave up."""
        constraint = self._live.get(sequence.id)
        if constraint is None:
            return
        if constraint.error:
            sequence.finish_reason = FinishReason.ERROR
        elif sequence.finish_reason is None and constraint.complete:
            sequence.finish_reason = FinishReason.STOP

    def failure(self, sequence: Sequence) -> tuple[str, bool]:
        """Why a sequence's grammar gave up (empty: it did not), and whether at a limit of complexity."""
        constraint = self._live.get(sequence.id)
        return ("", False) if constraint is None else (constraint.error, constraint.too_complex)

    def close(self) -> None:
        """Stop the compiler."""
        self._filler.close()
        if self.compiler is not None:
            self.compiler.close()


def _leave(future: Future[Constraint]) -> None:
    """A grammar whose sequence went away while it was compiled."""
    if not future.cancelled() and future.exception() is None:
        future.result().leave()


@dataclass(slots=True)
class PendingMasks:
    """Masks that are being made.

    Attributes:
        host: int32 [rows * words + rows]: bits, then row numbers.
        filled: done when the bits are there; None: they are.
    """

    host: Tensor
    rows: int
    words: int
    device: torch.device
    filled: Future[None] | None

    def take(self) -> Masks:
        """Wait for them, and upload them in one copy."""
        if self.filled is not None:
            self.filled.result()
        uploaded = self.host.to(self.device, non_blocking=True)
        bits = self.rows * self.words
        return Masks(uploaded[bits:], uploaded[:bits].view(self.rows, self.words))


class _Buffers:
    """Memory of the host in turn, so that none is asked for within a step; at most two steps are in flight."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._ring = [torch.empty(0, dtype=torch.int32) for _ in range(4)]
        self._turn = 0

    def take(self, size: int) -> Tensor:
        """int32 [size], with anything in it."""
        self._turn = (self._turn + 1) % len(self._ring)
        if len(self._ring[self._turn]) < size:
            self._ring[self._turn] = torch.empty(2 * size, dtype=torch.int32, pin_memory=self._pinned)
        return self._ring[self._turn][:size]
