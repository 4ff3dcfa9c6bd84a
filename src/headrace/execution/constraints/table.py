"""The constraints of the sequences that live in a core."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

from headrace.errors import HeadraceError, InvalidRequest
from headrace.execution.constraints.compiler import Constraint, ConstraintCompiler
from headrace.execution.sampler import Masks
from headrace.scheduling.plan import StepPlan
from headrace.scheduling.sequence import Sequence
from headrace.types import FinishReason

__all__ = ["ConstraintTable"]


class ConstraintTable:
    """Which sequence follows which grammar, from compilation to its end.

    Args:
        compiler: None refuses constraints.
        device: where logits are.
    """

    def __init__(self, compiler: ConstraintCompiler | None, device: torch.device) -> None:
        self._compiler = compiler
        self._device = device
        self._compiling: dict[str, tuple[Sequence, Future[Constraint]]] = {}
        self._live: dict[str, Constraint] = {}
        self._pool: Any = None

    def add(self, sequence: Sequence) -> None:
        """Begin to compile the sequence's grammar, if it has one."""
        spec = sequence.sampling.constraint
        if spec is None:
            return
        if self._compiler is None:
            raise InvalidRequest("this engine was built without constraints", param="response_format")
        self._compiling[sequence.id] = (sequence, self._compiler.submit(spec))

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that ended."""
        self._live.pop(sequence.id, None)
        compiling = self._compiling.pop(sequence.id, None)
        if compiling is not None:
            compiling[1].cancel()

    def is_ready(self, sequence: Sequence) -> bool:
        """Whether the sequence may run."""
        return sequence.id not in self._compiling

    def refused(self) -> list[tuple[Sequence, str]]:
        """Take note of finished compilations; those that failed, with the reason."""
        failed = []
        for request_id, (sequence, future) in list(self._compiling.items()):
            if not future.done():
                continue
            del self._compiling[request_id]
            error = future.exception()
            if error is None:
                self._live[request_id] = future.result()
            else:
                failed.append((sequence, error.message if isinstance(error, HeadraceError) else repr(error)))
        return failed

    def masks(self, plan: StepPlan) -> tuple[Masks | None, list[tuple[Sequence, str]]]:
        """Allowed tokens of the plan's constrained rows, in one upload, and sequences whose grammar gave up."""
        live = self._live
        found = [
            (row, chunk.sequence, constraint)
            for row, chunk in enumerate(plan.sampling if live else ())
            if (constraint := live.get(chunk.sequence.id)) is not None and constraint.active
        ]
        if not found:
            return None, []
        assert self._compiler is not None
        rows, words = len(found), -(-self._compiler.vocab_size // 32)
        pinned = self._device.type == "cuda"
        host = torch.zeros(
            rows * words + rows, dtype=torch.int32, pin_memory=pinned
        )  # bits, then row numbers
        flat = host.numpy()
        self._fill([constraint for _, _, constraint in found], flat[: rows * words].reshape(rows, words))
        flat[rows * words :] = [row for row, _, _ in found]
        failed = []
        for _, sequence, constraint in found:
            try:
                constraint.check()
            except HeadraceError as error:
                failed.append((sequence, error.message))
        uploaded = host.to(self._device, non_blocking=True)
        return Masks(uploaded[rows * words :], uploaded[: rows * words].view(rows, words)), failed

    def _fill(self, constraints: list[Constraint], bits: np.ndarray) -> None:
        """Masks of many grammars in parallel, outside Python's lock, into rows of ``bits``."""
        jobs = []
        for i, constraint in enumerate(constraints):
            if constraint.forced is None:
                jobs.append((constraint.matcher, i))
        row_bytes = bits.strides[0]
        if len(jobs) == 1:
            matcher, i = jobs[0]
            matcher.unsafe_compute_mask_ptr(bits.ctypes.data + i * row_bytes, row_bytes)
        elif jobs:
            self._executor().unsafe_compute_mask_ptr(jobs, bits.ctypes.data, row_bytes, len(bits))
        unsigned = bits.view(np.uint32)
        for i, constraint in enumerate(constraints):
            more = constraint.forced if constraint.forced is not None else constraint.head_begins
            if more is not None:
                unsigned[i, more // 32] |= np.uint32(1 << more % 32)

    def _executor(self) -> Any:
        if self._pool is None:
            from llguidance import LLExecutor

            self._pool = LLExecutor()
        return self._pool

    def advance(self, sequence: Sequence) -> None:
        """The sequence got its newest token; a complete grammar ends it."""
        constraint = self._live.get(sequence.id)
        if constraint is None or sequence.finish_reason is not None:
            return
        try:
            constraint.advance(sequence.token_ids[-1])
        except HeadraceError:
            sequence.finish_reason = FinishReason.ERROR
            return
        if constraint.complete:
            sequence.finish_reason = FinishReason.STOP

    def close(self) -> None:
        """Stop the compiler."""
        if self._compiler is not None:
            self._compiler.close()
