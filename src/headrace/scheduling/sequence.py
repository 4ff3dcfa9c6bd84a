"""One request while it lives in a core."""

from __future__ import annotations

import secrets
from enum import IntEnum

from headrace.kvcache.table import BlockTable
from headrace.types import FinishReason, Request, SamplingParams

__all__ = ["Sequence", "Status"]


class Status(IntEnum):
    """Where a sequence is."""

    WAITING = 0
    RUNNING = 1
    FINISHED = 2


class Sequence:
    """Tokens and progress of one request.

        0 ......... num_computed ......... len(token_ids) ......... length
        keys in the cache or    known, not yet        sampled on the device,
        on their way there      scheduled             not yet seen by the host

    Attributes:
        token_ids: prompt, then output as far as known.
        num_computed: tokens whose keys are, or will be after the steps in flight, in the cache.
        in_flight: sampled tokens that the host has not seen (0 in the plain loop, those of two steps at most in the
            overlapped).
        limit: length at which the sequence ends whatever it says.
        row: its slot in the runner's per-sequence state while it runs, else -1.
        num_told: output tokens that its client has been told of.
        num_cached: prompt tokens that came from the prefix cache when it first ran, -1 before.
        epoch: how often it was preempted.
        seed: of its random numbers; drawn here when the request gives none, so that it survives preemption.
    """

    __slots__ = (
        "arrival",
        "epoch",
        "finish_reason",
        "id",
        "in_flight",
        "limit",
        "num_cached",
        "num_computed",
        "num_prompt",
        "num_told",
        "request",
        "row",
        "sampling",
        "seed",
        "status",
        "stop_ids",
        "table",
        "token_ids",
    )

    def __init__(
        self, request: Request, table: BlockTable, *, arrival: int, limit: int, eos_ids: frozenset[int]
    ) -> None:
        assert request.sampling is not None
        self.request = request
        self.id = request.id
        self.sampling: SamplingParams = request.sampling
        self.token_ids = list(request.token_ids)
        self.num_prompt = len(self.token_ids)
        self.table = table
        self.arrival = arrival
        self.limit = limit
        self.num_computed = 0
        self.in_flight = 0
        self.num_cached = -1
        self.num_told = 0
        self.epoch = 0
        self.seed = secrets.randbits(63) if self.sampling.seed is None else self.sampling.seed
        self.row = -1
        self.status = Status.WAITING
        self.finish_reason: FinishReason | None = None
        stops = frozenset(self.sampling.stop_token_ids)
        self.stop_ids = stops if self.sampling.ignore_eos else stops | eos_ids

    @property
    def length(self) -> int:
        """Tokens including those that only the device knows."""
        return len(self.token_ids) + self.in_flight

    @property
    def num_output(self) -> int:
        """Output tokens that the host knows."""
        return len(self.token_ids) - self.num_prompt

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first: priority, then arrival."""
        return (self.request.priority, self.arrival)

    @property
    def looks_back(self) -> bool:
        """Sampling looks at earlier output tokens."""
        s = self.sampling
        return (
            s.repetition_penalty != 1.0
            or s.presence_penalty != 0.0
            or s.frequency_penalty != 0.0
            or bool(s.bad_words)
        )

    @property
    def needs_history(self) -> bool:
        """What is sampled depends on earlier output tokens, so the host must know them first."""
        return self.sampling.constraint is not None or self.looks_back

    def append(self, token: int) -> None:
        """Settle one sampled token and see whether it ends the sequence."""
        self.token_ids.append(token)
        if token in self.stop_ids and self.num_output > self.sampling.min_tokens:
            self.finish_reason = FinishReason.STOP
        elif len(self.token_ids) >= self.limit:
            self.finish_reason = FinishReason.LENGTH
