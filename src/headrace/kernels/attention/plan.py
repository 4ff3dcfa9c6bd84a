"""How a step's sequences are attended to on a CPU: worked out once a step and window, used by all layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from headrace.layers.packed import AttentionBatch

__all__ = ["GATHER_KEYS", "Gather", "Plan", "Span", "additive", "make_plan"]

# Up to this many keys, copying them beside those of other decoding sequences costs less than calls of their
# own; as long as the copy stays in the processor's cache. Measured on shapes of 135M parameters in float32.
GATHER_KEYS = 192
GATHER_ROWS = 1024
# Queries of one call: fewer see fewer keys in vain, more pay Python's price less often.
QUERY_SLICE = 64
# Whole prompts longer than this go in one call: it skips most of what is not seen, and needs no mask in memory.
LONG = 1024


@dataclass(slots=True, frozen=True)
class Span:
    """``count`` neighbouring sequences of one shape whose keys are one view.

    Attributes:
        query: first row of q; ``query_len`` rows a sequence.
        key: first row of the keys; ``key_len`` rows a sequence.
        fresh: the keys are rows of this step's k and v, else of the flattened cache.
        mask: added to the scores, [query_len, key_len], or None.
        causal: a square causal mask instead, which the attention function knows by itself.
    """

    query: int
    query_len: int
    key: int
    key_len: int
    count: int
    fresh: bool
    mask: Tensor | None
    causal: bool = False


@dataclass(slots=True, frozen=True)
class Gather:
    """``count`` sequences whose keys are copied side by side first.

    Attributes:
        queries: rows of q, int64 [count * query_len].
        index: rows of the flattened cache, int64 [count * L]. Behind its end a sequence repeats a key of its
            own, masked: foreign or never written rows might hold NaN.
        mask: added to the scores, [count, 1, 1, L] for several sequences, [query_len, L] for one, or None.
    """

    queries: Tensor
    query_len: int
    index: Tensor
    count: int
    mask: Tensor | None


@dataclass(slots=True)
class Plan:
    """Pieces of work in which every row of q occurs once, and memory that the gathers share."""

    pieces: list[Span | Gather]
    buffers: dict[object, Tensor] = field(default_factory=dict)

    def buffer(self, name: str, like: Tensor, rows: int) -> Tensor:
        """[rows, *like.shape[1:]], the same memory in every call: it stays in the processor's cache."""
        key = (name, like.shape[1:], like.dtype)
        whole = self.buffers.get(key)
        if whole is None:
            most = max(piece.index.shape[0] for piece in self.pieces if isinstance(piece, Gather))
            whole = self.buffers[key] = torch.empty((most, *like.shape[1:]), dtype=like.dtype)
        return whole[:rows]


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where allowed, minus infinity elsewhere: what attention adds to the scores."""
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -torch.inf)


def make_plan(
    batch: AttentionBatch, window: int | None, block_size: int, dtype: torch.dtype, *, whole: bool = True
) -> Plan:
    """Decide for every sequence; ``dtype`` is that of masks, ``block_size`` 0 without a cache.

    ``whole``: long prompts may go in one call.
    """
    return _Planner(batch, window, block_size, dtype, whole).plan()


class _Planner:
    def __init__(
        self, batch: AttentionBatch, window: int | None, block_size: int, dtype: torch.dtype, whole: bool
    ) -> None:
        self.window, self.block_size, self.dtype, self.causal = window, block_size, dtype, batch.causal
        self.whole = whole
        self.query_lens = batch.host_query_lens or batch.query_starts.diff().tolist()
        self.seq_lens = batch.host_seq_lens or batch.seq_lens.tolist()
        self.blocks = batch.host_blocks or []
        if not self.blocks and batch.block_tables is not None:
            self.blocks = batch.block_tables.tolist()
        self.masks: dict[tuple[int, int, int], Tensor | None] = {}

    def plan(self) -> Plan:
        pieces: list[Span | Gather] = []
        short: list[tuple[int, int, int, int]] = []  # sequence, its row of q, first key, keys
        row = 0
        for i, (query_len, key_len) in enumerate(zip(self.query_lens, self.seq_lens)):
            if query_len == 0:  # padding of a batch
                continue
            first, _ = self.seen(key_len - query_len, key_len, key_len)  # earlier keys are seen by none
            fresh = query_len == key_len
            start = row if fresh else self.consecutive(i, first)
            member = (i, row, first, key_len - first)
            if not fresh and query_len == 1 and member[3] <= GATHER_KEYS and len(self.query_lens) > 1:
                short.append(member)
            elif start is None:
                pieces.append(self.gather([member]))
            else:
                self.add_spans(pieces, member, start)
            row += query_len
        short.sort(key=lambda member: member[3])  # neighbours of like length need little padding
        while short:
            count = max(1, GATHER_ROWS // short[-1][3])
            pieces.append(self.gather(short[-count:]))
            del short[-count:]
        return Plan(pieces)

    def consecutive(self, sequence: int, first: int) -> int | None:
        """The cache's row of key ``first`` if all later keys follow it there, else None."""
        low, high = first // self.block_size, (self.seq_lens[sequence] - 1) // self.block_size
        blocks = self.blocks[sequence]
        base = blocks[low]
        if blocks[high] - base != high - low or blocks[low : high + 1] != list(
            range(base, base + high - low + 1)
        ):
            return None
        return base * self.block_size + first % self.block_size

    def add_spans(self, pieces: list[Span | Gather], member: tuple[int, int, int, int], start: int) -> None:
        """Append a sequence with its keys in one view, a slice of queries with the keys it sees at a time."""
        sequence, row, first, _ = member
        query_len, key_len = self.query_lens[sequence], self.seq_lens[sequence]
        past, fresh = key_len - query_len, query_len == key_len
        all_seen = self.window is None or self.window >= key_len
        if self.whole and self.causal and fresh and query_len > LONG and all_seen:
            pieces.append(Span(row, query_len, start, key_len, 1, True, None, causal=True))
            return
        step = QUERY_SLICE if self.causal or self.window is not None else query_len
        for low in range(0, query_len, step):
            high = min(low + step, query_len)
            begin, end = self.seen(past + low, past + high, key_len)
            mask = self.mask(past + low - begin, high - low, end - begin)
            span = Span(row + low, high - low, start + begin - first, end - begin, 1, fresh, mask)
            last = pieces[-1] if pieces else None
            if isinstance(last, Span) and fresh and query_len <= step and _joins(last, span):
                count = last.count + 1
                pieces[-1] = Span(last.query, last.query_len, last.key, last.key_len, count, True, last.mask)
            else:
                pieces.append(span)

    def seen(self, low: int, high: int, key_len: int) -> tuple[int, int]:
        """The range of keys that queries at positions low .. high - 1 see some of."""
        begin = 0 if self.window is None else max(0, low - self.window + 1)
        if self.causal:
            return begin, high
        return begin, key_len if self.window is None else min(key_len, high + self.window - 1)

    def mask(self, offset: int, queries: int, keys: int) -> Tensor | None:
        """Mask of queries that begin ``offset`` keys after the first; None where all is seen. Equal ones are one."""
        shape = (offset, queries, keys)
        if shape not in self.masks:
            distance = torch.arange(offset, offset + queries)[:, None] - torch.arange(keys)
            allowed = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
            if self.window is not None:
                allowed &= distance.abs() < self.window
            self.masks[shape] = None if bool(allowed.all()) else additive(allowed, self.dtype)
        return self.masks[shape]

    def gather(self, members: list[tuple[int, int, int, int]]) -> Gather:
        """Several sequences of one query each, or one of any number."""
        query_len = self.query_lens[members[0][0]]
        longest = max(keys for *_, keys in members)
        lens = torch.tensor([keys for *_, keys in members])[:, None]
        firsts = torch.tensor([first for _, _, first, _ in members])[:, None]
        keys = torch.arange(longest).expand(len(members), -1)
        positions = firsts + torch.minimum(keys, lens - 1)
        width = max(len(self.blocks[sequence]) for sequence, *_ in members)
        table = torch.tensor([self.blocks[s] + [0] * (width - len(self.blocks[s])) for s, *_ in members])
        index = table.gather(1, positions // self.block_size) * self.block_size + positions % self.block_size
        rows = torch.tensor([row for _, row, *_ in members])[:, None] + torch.arange(query_len)
        if len(members) > 1:
            equal = all(member[3] == longest for member in members)
            mask = None if equal else additive(keys < lens, self.dtype)[:, None, None, :]
        else:
            sequence, _, first, count = members[0]
            mask = self.mask(self.seq_lens[sequence] - query_len - first, query_len, count)
        return Gather(rows.flatten(), query_len, index.flatten(), len(members), mask)


def _joins(last: Span, span: Span) -> bool:
    """Whether two fresh sequences of one shape are neighbours (gathered ones may lie between)."""
    same = last.fresh and last.query_len == span.query_len and last.key_len == span.key_len
    return same and last.query + last.query_len * last.count == span.query and last.mask is span.mask
