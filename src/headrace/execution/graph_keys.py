"""Which CUDA graph a step takes, and all that there can be: steps are padded to ladders of sizes."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from headrace.config.plan.scratch import DECODE_GRAPHS
from headrace.kernels.attention.decode_shapes import is_long
from headrace.scheduling.plan import StepPlan

__all__ = ["MIXED_TOKENS", "GraphKey", "GraphLadders", "ladder", "up"]

MIXED_TOKENS = (
    *(16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512),
    *range(640, 1025, 128),
    *range(1280, 2049, 256),
    *range(2560, 4097, 512),
    *range(5120, 8193, 1024),
)
MIXED_SEQS = (16, 64, 256, 1024)
_FORESEEN_TOKENS = 1024  # of a step whose graph is made before it is needed


def ladder(sizes: tuple[int, ...], largest: int) -> list[int]:
    """The sizes below ``largest``, and it."""
    return [size for size in sizes if size < largest] + [largest]


def up(sizes: list[int] | tuple[int, ...], size: int) -> int:
    """The smallest step of a ladder that holds ``size``."""
    return sizes[bisect.bisect_left(sizes, size)]


class GraphKey(NamedTuple):
    """Which graph.

    Attributes:
        tokens, seqs: sizes that the step is padded to.
        kind: decode to ``tokens`` (greedy), to ``drawn`` tokens, to ``filtered`` ones (drawn behind top-k, top-p and
            min-p), or to ``logits``; or ``mixed``.
        some_single, fresh: of a mixed step, see AttentionBatch.
        long: of a decode step with a sequence that asks for another cut of attention (is_long).
    """

    tokens: int
    seqs: int
    kind: str
    some_single: bool = True
    fresh: bool = False
    long: bool = False

    @property
    def lanes(self) -> int:
        """Sequences, rounded up so that tensors are aligned to 16 bytes: Triton compiles anew for others."""
        return -(-self.seqs // 4) * 4

    @property
    def size(self) -> int:
        """int32 values that the host sends: packed [4, tokens]; query_starts, seq_lens, rows and places to sample of
        a mixed step; the tensors of Draws in ``lanes``."""
        size = 4 * self.tokens + (4 * self.seqs + 1 if self.kind == "mixed" else 0)
        return size + (6 * self.lanes if self.draws else 0)

    @property
    def draws(self) -> bool:
        """The graph draws random tokens."""
        return self.kind in ("drawn", "filtered")


class GraphLadders:
    """The graphs of one model.

    Attributes:
        decode_sizes: batches that decode steps are padded to.
        seq_sizes: sequences that mixed steps are padded to.

    Args:
        max_num_seqs: sequences of a step at most.
        max_model_len: tokens of the longest sequence.
        heads: key heads and their dimension, where attention of long sequences is cut in another way.
        fixed: see Runner.
    """

    def __init__(
        self, max_num_seqs: int, max_model_len: int, heads: tuple[int, int] | None, *, fixed: bool
    ) -> None:
        self.decode_sizes = ladder(DECODE_GRAPHS, max_num_seqs)
        self.seq_sizes = ladder(MIXED_SEQS, max_num_seqs)
        self._max_model_len, self._heads, self._fixed = max_model_len, heads, fixed

    def decode(self, num_seqs: int, longest: int, kind: str) -> GraphKey:
        """Of a step of one token for each of ``num_seqs`` sequences, the longest of so many tokens."""
        size = up(self.decode_sizes, num_seqs)
        return GraphKey(size, size, kind, long=self._is_long(size, longest))

    def mixed(self, plan: StepPlan) -> GraphKey:
        """Of any other step of up to MIXED_TOKENS[-1] tokens."""
        return GraphKey(
            up(MIXED_TOKENS, plan.num_tokens),
            up(self.seq_sizes, len(plan.chunks)),
            "mixed",
            # In a fixed order all sequences are attended to in one way.
            some_single=self._fixed or plan.chunks[0].count == 1,
            fresh=not self._fixed and all(chunk.start == 0 or chunk.count == 1 for chunk in plan.chunks),
        )

    def of_decode(self, size: int, kind: str) -> list[GraphKey]:
        """Of decode steps of short sequences, and of long ones where they have a graph of their own."""
        long = self._is_long(size, self._max_model_len)
        return [GraphKey(size, size, kind, long=cut) for cut in (False, True)[: 1 + long]]

    def all(self, tokens: int) -> Iterator[GraphKey]:
        """Of every graph that steps of up to ``tokens`` tokens can need."""
        for size, kind in itertools.product(self.decode_sizes, ("tokens", "drawn", "filtered", "logits")):
            yield from self.of_decode(size, kind)
        flags = [(True, False)] if self._fixed else list(itertools.product((True, False), repeat=2))
        for size in ladder(MIXED_TOKENS, up(MIXED_TOKENS, min(tokens, MIXED_TOKENS[-1]))):
            for below, seqs in zip((0, *self.seq_sizes), self.seq_sizes):
                if below < size:
                    yield from (GraphKey(size, seqs, "mixed", *flag) for flag in flags)

    def likely(self, tokens: int) -> list[GraphKey]:
        """Of the graphs that traffic is likely to need, single requests first."""
        drawn = [
            GraphKey(size, size, kind) for size in self.decode_sizes[:5] for kind in ("drawn", "filtered")
        ]
        prompts = [size for size in MIXED_TOKENS if size <= min(tokens, _FORESEEN_TOKENS)]
        seqs = self.seq_sizes[0]
        kinds = [(True, False)] if self._fixed else [(False, True), (True, True)]
        return [
            *drawn[:2],
            *(GraphKey(size, seqs, "mixed", *kinds[0]) for size in prompts),
            *(GraphKey(size, size, "tokens") for size in self.decode_sizes),
            *drawn[2:],
            *(GraphKey(size, seqs, "mixed", *kind) for kind in kinds[1:] for size in prompts),
            *(key for size in self.decode_sizes for key in self.of_decode(size, "tokens")[1:]),
        ]

    def _is_long(self, num_seqs: int, longest: int) -> bool:
        if self._heads is None:
            return False
        num_heads, head_dim = self._heads
        return is_long(num_seqs * num_heads, head_dim, longest)
