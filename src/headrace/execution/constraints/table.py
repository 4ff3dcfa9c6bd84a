"""The constraints of the sequences that live in a core."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import torch
from torch import Tensor

from headrace.errors import HeadraceError, InvalidRequest
from headrace.execution.constraints.compiler import Constraint, ConstraintCompiler
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

    def masks(self, plan: StepPlan) -> tuple[dict[int, Tensor], list[tuple[Sequence, str]]]:
        """Allowed tokens by row of the plan's logits, bool [V' >= V], and sequences whose grammar gave up."""
        masks: dict[int, Tensor] = {}
        failed: list[tuple[Sequence, str]] = []
        if not self._live:
            return masks, failed
        assert self._compiler is not None
        for i, chunk in enumerate(plan.sampling):
            constraint = self._live.get(chunk.sequence.id)
            if constraint is None or not constraint.active:
                continue
            bits = np.zeros(-(-self._compiler.vocab_size // 32), np.int32)
            try:
                constraint.fill(bits)
            except HeadraceError as error:
                failed.append((chunk.sequence, error.message))
                continue
            allowed = np.unpackbits(bits.view(np.uint8), bitorder="little").view(np.bool_)
            masks[i] = torch.from_numpy(allowed[: self._compiler.vocab_size]).to(self._device)
        return masks, failed

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
