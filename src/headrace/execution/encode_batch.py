"""What a pass takes from the host: one buffer of 32-bit integers, one copy, views of it on the device."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headrace.errors import InvalidRequest
from headrace.layers.packed import AttentionBatch, PackedBatch

__all__ = ["buffer_size", "fill", "upload", "view"]

Ints = npt.NDArray[np.int32]


def buffer_size(tokens: int, seqs: int, *, types: bool) -> int:
    """Integers of a batch: id, position (and type) of each token, then starts and lengths of the sequences."""
    return (3 if types else 2) * tokens + 2 * seqs + 1


def fill(
    flat: Ints,
    tokens: int,
    seqs: int,
    token_ids: Sequence[Sequence[int]],
    token_types: Sequence[Sequence[int]] | None,
    vocab_size: int,
) -> None:
    """Write sequences into ``flat``, padded to so many tokens and sequences. Raises InvalidRequest for a wrong id.

    Ids are judged here, all at once, because one by one that takes as long as everything else the host does.

    Padding tokens are one more sequence (there must be room for it), and what follows it are empty ones: so every
    row of the batch belongs to a sequence, and no kernel meets rows that were never written.
    """
    count = len(token_ids)
    lengths = np.fromiter((len(ids) for ids in token_ids), np.int32, count)
    ends = np.cumsum(lengths, dtype=np.int32)
    total = int(ends[-1])
    ids, positions = flat[:tokens], flat[tokens : 2 * tokens]
    try:
        ids[:total] = np.fromiter(chain.from_iterable(token_ids), np.int32, total)
    except OverflowError:
        ids[0] = -1
    if ids[:total].min() < 0 or ids[:total].max() >= vocab_size:
        raise InvalidRequest(
            f"a token id is outside the vocabulary; expected 0 to {vocab_size - 1}", param="input"
        )
    positions[:total] = np.arange(total, dtype=np.int32) - np.repeat(ends - lengths, lengths)
    ids[total:] = positions[total:] = 0
    if token_types is not None:
        types = flat[2 * tokens : 3 * tokens]
        types[:total] = np.fromiter(chain.from_iterable(token_types), np.int32, total)
        types[total:] = 0
    starts = flat[-2 * seqs - 1 : -seqs]
    starts[0], starts[1 : count + 1], starts[count + 1 :] = 0, ends, tokens
    flat[-seqs:] = np.diff(starts)


def upload(flat: Ints, device: torch.device) -> Tensor:
    """The buffer on the device; the host does not wait."""
    host = torch.from_numpy(flat)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def view(given: Tensor, tokens: int, seqs: int, *, types: bool, causal: bool, longest: int) -> PackedBatch:
    """The batch that lies in a buffer."""
    attention = AttentionBatch(
        query_starts=given[-2 * seqs - 1 : -seqs],
        seq_lens=given[-seqs:],
        causal=causal,
        max_query_len=longest,
        max_seq_len=longest,
    )
    token_types = given[2 * tokens : 3 * tokens] if types else None
    return PackedBatch(given[:tokens], given[tokens : 2 * tokens], attention, token_types)
