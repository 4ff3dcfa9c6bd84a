"""What the host sends to a captured step: four integers a token and three a sequence."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from headrace.execution.graph_keys import GraphKey
from headrace.scheduling.plan import Chunk

__all__ = [
    "REPEATS",
    "StepArrays",
    "draws_size",
    "fill",
    "fill_draws",
]

REPEATS = 8  # of a decode step without the host, at most


class StepArrays(NamedTuple):
    """A step's chunks as arrays [S]: rows of per-sequence state, first positions, tokens, and ends in the batch."""

    rows: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    ends: np.ndarray

    @staticmethod
    def of(chunks: list[Chunk]) -> StepArrays:
        num = len(chunks)
        counts = np.fromiter((c.count for c in chunks), np.int64, num)
        return StepArrays(
            np.fromiter((c.row for c in chunks), np.int64, num),
            np.fromiter((c.start for c in chunks), np.int64, num),
            counts,
            np.cumsum(counts),
        )


def fill(
    flat: np.ndarray, key: GraphKey, chunks: list[Chunk], arrays: StepArrays, padding: int
) -> np.ndarray:
    """Write a step but for its new blocks into ``flat`` int32 [key.size].

    Args:
        padding: the row of tokens and sequences that stand for none.

    Returns:
        packed, int32 [4, key.tokens], as begin_step takes it: row, position, token (-1: only the device knows it), new
        block (-1: none).
    """
    rows, starts, counts, ends = arrays
    packed = flat[: 4 * key.tokens].reshape(4, key.tokens)
    total, num = int(ends[-1]), len(chunks)
    packed[0, :total], packed[0, total:] = np.repeat(rows, counts), padding
    packed[1, :total], packed[1, total:] = np.arange(total) + np.repeat(starts - ends + counts, counts), 0
    packed[2, :total], packed[2, total:] = _tokens(chunks), 0
    packed[3] = -1
    if key.kind == "mixed":
        seqs, samples = key.seqs, [chunk.samples for chunk in chunks]
        query_starts, seq_lens, seq_rows, last = np.split(
            flat[4 * key.tokens : key.size], [seqs + 1, 2 * seqs + 1, 3 * seqs + 1]
        )
        query_starts[0], query_starts[1 : num + 1], query_starts[num + 1 :] = 0, ends, total
        seq_lens[:num], seq_lens[num:] = starts + counts, 0
        seq_rows[:num], seq_rows[num:] = rows, padding
        last[: sum(samples)] = ends[samples] - 1
    return packed


def draws_size(key: GraphKey) -> int:
    """int32 values of the keys of one draw."""
    return 2 * key.lanes if key.draws else 0


def fill_draws(flat: np.ndarray, key: GraphKey, arrays: list[np.ndarray]) -> None:
    """Write the tensors of Draws, [S] and [S, 2] of four bytes a value, behind the rest of ``flat``."""
    at = 4 * key.tokens
    for array in arrays:
        end = at + key.lanes * (array.size // len(array))
        flat[at : at + array.size], flat[at + array.size : end] = array.reshape(-1).view(np.int32), 0
        at = end


def _tokens(chunks: list[Chunk]) -> list[int]:
    """Token ids of the step; -1 where only the device knows."""
    flat: list[int] = []
    for chunk in chunks:
        known = chunk.sequence.token_ids
        if chunk.count == 1:
            flat.append(-1 if chunk.from_device else known[chunk.start])
        else:
            flat.extend(known[chunk.start : chunk.start + chunk.count])
            if chunk.from_device:
                flat.append(-1)
    return flat
