"""How a step's sequences are attended to on a CPU: worked out once a step and window, used by all layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headrace.kernels.attention.reference import visible

if TYPE_CHECKING:
    from headrace.layers.packed import AttentionBatch

__all__ = ["GATHER_KEYS", "Gather", "Plan", "Span", "additive", "make_plan"]

# Up to this many keys, copying them beside those of other decoding sequences costs less than calls of their
# own; as long as the copy stays in the processor's cache. Measured on shapes of 135M parameters in float32.
GATHER_KEYS = 192
GATHER_ROWS = 1024


@dataclass(slots=True, frozen=True)
class Span:
    """``count`` neighbouring sequences of one shape whose keys are one view.

    Attributes:
        query: first row of q; ``query_len`` rows a sequence.
        key: first row of the keys; ``key_len`` rows a sequence.
        fresh: the keys are rows of this step's k and v, else of the flattened cache.
        causal: a square causal mask, which attention kernels know by themselves.
        mask: added to the scores, [query_len, key_len], or None.
    """

    query: int
    query_len: int
    key: int
    key_len: int
    count: int
    fresh: bool
    causal: bool
    mask: Tensor | None


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


def make_plan(batch: AttentionBatch, window: int | None, block_size: int, dtype: torch.dtype) -> Plan:
    """Decide for every sequence; ``dtype`` is that of masks, ``block_size`` 0 without a cache."""
    return _Planner(batch, window, block_size, dtype).plan()


class _Planner:
    def __init__(
        self, batch: AttentionBatch, window: int | None, block_size: int, dtype: torch.dtype
    ) -> None:
        self.window, self.block_size, self.dtype, self.causal = window, block_size, dtype, batch.causal
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
            # Keys before the window of the first query are seen by none.
            first = 0
            if self.window is not None and self.causal:
                first = max(0, key_len - query_len - self.window + 1)
            fresh = query_len == key_len
            start = row if fresh else self.consecutive(i, first)
            member = (i, row, first, key_len - first)
            if not fresh and query_len == 1 and member[3] <= GATHER_KEYS and len(self.query_lens) > 1:
                short.append(member)
            elif start is None:
                pieces.append(self.gather([member]))
            else:
                self.add_span(pieces, member, start)
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

    def add_span(self, pieces: list[Span | Gather], member: tuple[int, int, int, int], start: int) -> None:
        """Append a sequence with its keys in one view, or count it to its like just before it."""
        sequence, row, first, keys = member
        query_len, key_len = self.query_lens[sequence], self.seq_lens[sequence]
        fresh = query_len == key_len
        square = self.causal and fresh and query_len > 1 and (self.window is None or key_len <= self.window)
        mask = None if square else self.mask(query_len, key_len, first)
        last = pieces[-1] if pieces else None
        if (
            isinstance(last, Span)
            and last.fresh
            and fresh
            and last.query_len == query_len
            and last.query + query_len * last.count == row  # gathered ones may lie between
        ):
            pieces[-1] = Span(last.query, query_len, last.key, keys, last.count + 1, True, square, mask)
        else:
            pieces.append(Span(row, query_len, start, keys, 1, fresh, square, mask))

    def mask(self, query_len: int, key_len: int, first: int) -> Tensor | None:
        """Mask of the keys from ``first`` on, or None where all may be seen; equal shapes share one."""
        shape = (query_len, key_len, first)
        if shape not in self.masks:
            device = torch.device("cpu")
            allowed = visible(query_len, key_len, causal=self.causal, window=self.window, device=device)[
                :, first:
            ]
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
            sequence, _, first, _ = members[0]
            mask = self.mask(query_len, self.seq_lens[sequence], first)
        return Gather(rows.flatten(), query_len, index.flatten(), len(members), mask)
