"""The constraints of the sequences that live in a core."""

from __future__ import annotations

import torch

from headrace.errors import HeadraceError, InvalidRequest
from headrace.execution.constraints.compiler import Compilation, ConstraintCompiler
from headrace.execution.constraints.constraint import Constraint
from headrace.execution.constraints.fill import MaskFiller
from headrace.execution.sampler import Masks
from headrace.scheduling.plan import StepPlan
from headrace.scheduling.sequence import Sequence, Status
from headrace.types import FinishReason

__all__ = ["ConstraintTable"]


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
        self._live.pop(sequence.id, None)
        compiling = self._compiling.pop(sequence.id, None)
        if compiling is not None:
            compiling[1].future.cancel()

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

    def masks(self, plan: StepPlan) -> Masks | None:
        """Allowed tokens of the plan's constrained rows, in one upload."""
        live = self._live
        found = [
            (row, constraint)
            for row, chunk in enumerate(plan.sampling if live else ())
            if (constraint := live.get(chunk.sequence.id)) is not None and constraint.active
        ]
        if not found:
            return None
        rows, words = len(found), self._filler.words
        pinned = self._device.type == "cuda"
        # bits, then row numbers
        host = torch.zeros(rows * words + rows, dtype=torch.int32, pin_memory=pinned)
        flat = host.numpy()
        self._filler.fill([constraint for _, constraint in found], flat[: rows * words].reshape(rows, words))
        flat[rows * words :] = [row for row, _ in found]
        uploaded = host.to(self._device, non_blocking=True)
        return Masks(uploaded[rows * words :].long(), uploaded[: rows * words].view(rows, words))

    def advance(self, plan: StepPlan, tokens: list[int]) -> None:
        """A step's tokens are known: all grammars move on, before anything else is settled."""
        live = self._live
        if not live:
            return
        jobs = []
        for chunk, token in zip(plan.sampling, tokens, strict=True):
            constraint = live.get(chunk.sequence.id)
            if constraint is None or token < 0 or chunk.sequence.status is Status.FINISHED:
                continue
            if constraint.read(token):
                jobs.append((constraint.matcher, token))
        self._filler.consume(jobs)

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
        if constraint is None or not (reason := constraint.error):
            return "", False
        return reason, constraint.too_complex

    def close(self) -> None:
        """Stop the compiler."""
        self._filler.close()
        if self.compiler is not None:
            self.compiler.close()
