"""Logits to tokens, one independent row a sequence: what the host knows, for the kernels that do it.

A row's token depends on its logits, its parameters, its seed and its position, and on nothing else in the batch.
Random rows run a race (kernels/sampling). It stays the same draw when rounding differs: with logits 1e-5 apart, one
number through the inverse of the cumulative distribution gives another token in 1 of 100 draws over 49,152 tokens
(each boundary between two of them moves), a race in 1 of 100,000.

Order of operations: logit bias and bans, penalties, masks, temperature, top-k, top-p, min-p (that of transformers).
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headrace.config.plan.scratch import SCORE_ELEMENTS
from headrace.execution.upload import upload
from headrace.kernels.sampling import Draws, Edits, Scores, draw_rows, edit_rows, forbid_rows, score_rows
from headrace.scheduling.plan import Chunk
from headrace.scheduling.sequence import Sequence
from headrace.types import TokenLogprobs

__all__ = ["HostScores", "Masks", "Sampled", "Sampler", "race_keys"]


@dataclass(slots=True)
class Masks:
    """Allowed tokens of some rows, on the device.

    Attributes:
        rows: int32 [M], rows of the logits.
        bits: int32 [M, ceil(V / 32)], little-endian; a set bit allows its token.
    """

    rows: Tensor
    bits: Tensor


class HostScores:
    """Log-probabilities on their way to the host; read them when the device is known to be done.

    Args:
        limits: of each row, how many most likely tokens were asked for.
    """

    def __init__(self, scores: Scores, limits: list[int]) -> None:
        self.limits = limits
        self._arrays = [tensor.to("cpu", non_blocking=True) for tensor in scores]
        self._entries: list[TokenLogprobs] | None = None

    def settle(self, tokens: Several[int]) -> None:
        """Read at once and keep no tensor: on a CPU small ones that live on between large ones keep the C library
        from using the memory of those again."""
        self._entries, self._arrays = self.read(tokens), []

    def read(self, tokens: Several[int]) -> list[TokenLogprobs]:
        """One entry for each row's token."""
        if self._entries is not None:
            return self._entries
        own, ranks, ids, values = (array.tolist() for array in self._arrays)
        return [
            TokenLogprobs(token, own[i], ranks[i], tuple(zip(ids[i][:k], values[i][:k])))
            for i, (token, k) in enumerate(zip(tokens, self.limits))
        ]


@dataclass(slots=True)
class Sampled:
    """Tokens of one step, still on the device.

    Attributes:
        tokens: int64 [P]; -1 where the logits were not finite.
        scored: rows whose log-probabilities were asked for, and these.
    """

    tokens: Tensor
    scored: list[int]
    scores: HostScores | None


def race_keys(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Two words for each (seed, position): SplitMix64 over both (Steele et al. 2014).

    Args:
        seeds: uint64 [P].
        positions: int64 [P].

    Returns:
        int32 [P, 2].
    """
    with np.errstate(over="ignore"):
        state = _mix(_mix(seeds) + positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return state.view(np.int32).reshape(-1, 2)


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


class _History:
    """The distinct tokens of a sequence, and how often each is in its output; grows with it."""

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        known = dict.fromkeys(sequence.token_ids[: sequence.num_prompt])
        self._index = {token: i for i, token in enumerate(known)}
        self._arrays = np.zeros((2, len(known) + 256), np.int32)
        self._arrays[0, : len(known)] = list(known)
        self._seen = sequence.num_prompt

    def follow(self) -> np.ndarray:
        """int32 [2, N]: ids and counts as of now."""
        for token in self.sequence.token_ids[self._seen :]:
            at = self._index.setdefault(token, len(self._index))
            if at == self._arrays.shape[1]:
                self._arrays = np.concatenate((self._arrays, np.zeros_like(self._arrays)), axis=1)
            self._arrays[0, at] = token
            self._arrays[1, at] += 1
        self._seen = len(self.sequence.token_ids)
        return self._arrays[:, : len(self._index)]


class Sampler:
    """Sampling parameters by row, and what becomes of logits with them.

    Args:
        max_num_seqs: rows.
        device: where the logits are.
    """

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self.device = device
        self.temperature = np.ones(max_num_seqs, np.float32)
        self.top_k = np.zeros(max_num_seqs, np.int32)
        self.top_p = np.ones(max_num_seqs, np.float32)
        self.min_p = np.zeros(max_num_seqs, np.float32)
        self.seed = np.zeros(max_num_seqs, np.uint64)
        self.scores = np.zeros(max_num_seqs, bool)  # log-probabilities are asked for
        self.edits = np.zeros(max_num_seqs, bool)  # see _is_edited
        self.simple = np.ones(max_num_seqs, bool)  # none of both, and no constraint
        self._histories: dict[int, _History] = {}

    def admit(self, sequence: Sequence) -> None:
        """Set a row up for a sequence that begins to run."""
        s, row = sequence.sampling, sequence.row
        self.temperature[row] = s.temperature
        self.top_k[row] = min(max(s.top_k, 0), np.iinfo(np.int32).max)
        self.top_p[row] = s.top_p
        self.min_p[row] = s.min_p
        self.seed[row] = np.uint64(sequence.seed & 0xFFFFFFFFFFFFFFFF)
        self.scores[row] = s.logprobs is not None
        self.edits[row] = _is_edited(sequence)
        self.simple[row] = not (self.scores[row] or self.edits[row] or s.constraint is not None)

    def sample(
        self,
        logits: Tensor,
        chunks: list[Chunk],
        masks: Masks | None = None,
        last_tokens: Tensor | None = None,
    ) -> Sampled:
        """One token for each chunk.

        Args:
            logits: float32 [P, V], changed in place.
            chunks: the P chunks that sample, in order.
            masks: of rows whose next token is constrained.
            last_tokens: int64 [max_num_seqs], gets the tokens by row.
        """
        rows = np.fromiter((c.row for c in chunks), np.int32, len(chunks))
        scored = np.flatnonzero(self.scores[rows]).tolist()
        arrays = self.draw_arrays(rows, chunks)
        edited = np.flatnonzero(self.edits[rows])
        if len(edited):
            arrays += self._edit_arrays(edited, [chunks[i] for i in edited])
        at = np.asarray(scored, np.int32)
        on_device, where, *tensors = upload([rows, at, *arrays], self.device)
        # Log-probabilities are those of the model, before any change.
        raw = None if not scored else logits if len(scored) == len(chunks) else logits[where]
        if len(edited) or masks is not None:
            raw = logits.clone() if raw is logits else raw
        if len(edited):
            edit_rows(logits, Edits(*tensors[5:]))
        if masks is not None:
            forbid_rows(logits, masks.rows, masks.bits)
        temperature, top_k, top_p, min_p, keys = tensors[:5]
        draws = Draws(temperature, top_k, top_p, min_p, keys, *self.filters(rows))
        tokens = draw_rows(logits, draws, last_tokens=last_tokens, rows=on_device)
        if raw is None:
            return Sampled(tokens, [], None)
        limits = [chunks[i].sequence.sampling.logprobs or 0 for i in scored]
        scores = _scores(raw, tokens if len(scored) == len(chunks) else tokens[where], max(limits))
        return Sampled(tokens, scored, HostScores(scores, limits))

    def score(self, logits: Tensor, targets: list[int], k: int) -> HostScores:
        """Log-probabilities of given tokens. logits [N, V]."""
        (tokens,) = upload([np.asarray(targets, np.int32)], self.device)
        found = HostScores(_scores(logits, tokens.long(), k), [k] * len(targets))
        if self.device.type == "cpu":
            found.settle(targets)
        return found

    def draw_arrays(self, rows: np.ndarray, chunks: list[Chunk]) -> list[np.ndarray]:
        """The tensors of Draws."""
        positions = np.fromiter((c.start + c.count for c in chunks), np.int64, len(chunks))
        columns = [column[rows] for column in (self.temperature, self.top_k, self.top_p, self.min_p)]
        return [*columns, race_keys(self.seed[rows], positions)]

    def filters(self, rows: np.ndarray) -> tuple[bool, bool, bool]:
        """Whether some row uses top-k, top-p and min-p."""
        drawn = rows[self.temperature[rows] > 0.0]
        top_k, top_p, min_p = (column[drawn] for column in (self.top_k, self.top_p, self.min_p))
        return bool(top_k.any()), bool((top_p < 1.0).any()), bool(min_p.any())

    def _edit_arrays(self, edited: np.ndarray, chunks: list[Chunk]) -> list[np.ndarray]:
        """The tensors of Edits."""
        biases = [_biases(chunk) for chunk in chunks]
        histories = [self._history(chunk) for chunk in chunks]
        settings = [c.sequence.sampling for c in chunks]
        ids = [token for bias in biases for token in bias]
        values = [value for bias in biases for value in bias.values()]
        history = np.concatenate(histories, axis=1)
        return [
            edited.astype(np.int32),
            np.cumsum([0, *map(len, biases)], dtype=np.int32),
            np.asarray(ids, np.int32),
            np.asarray(values, np.float32),
            np.cumsum([0, *(h.shape[1] for h in histories)], dtype=np.int32),
            history[0],
            history[1],
            np.asarray(
                [
                    [s.repetition_penalty for s in settings],
                    [s.presence_penalty for s in settings],
                    [s.frequency_penalty for s in settings],
                ],
                np.float32,
            ),
        ]

    def _history(self, chunk: Chunk) -> np.ndarray:
        if not _is_penalized(chunk.sequence):
            return np.zeros((2, 0), np.int32)
        found = self._histories.get(chunk.row)
        if found is None or found.sequence is not chunk.sequence:  # the row has changed hands
            found = self._histories[chunk.row] = _History(chunk.sequence)
        return found.follow()


def _scores(logits: Tensor, tokens: Tensor, k: int) -> Scores:
    """score_rows for some rows at a time: their order takes ten times the memory of their logits."""
    at_once = max(1, SCORE_ELEMENTS // logits.shape[1])
    if len(logits) <= at_once:
        return score_rows(logits, tokens, k)
    parts = zip(logits.split(at_once), tokens.split(at_once))
    found = [score_rows(some, targets, k) for some, targets in parts]
    return Scores(*(torch.cat(pieces) for pieces in zip(*found)))


def _is_penalized(sequence: Sequence) -> bool:
    s = sequence.sampling
    return s.repetition_penalty != 1.0 or s.presence_penalty != 0.0 or s.frequency_penalty != 0.0


def _is_edited(sequence: Sequence) -> bool:
    """Its logits are changed, now or at some time, by something other than a constraint."""
    s = sequence.sampling
    bans = bool(s.bad_words) or (s.min_tokens > 0 and bool(sequence.stop_ids))
    return bool(s.logit_bias) or bans or _is_penalized(sequence)


def _biases(chunk: Chunk) -> dict[int, float]:
    """What is added to logits of this row; -inf bans."""
    sequence = chunk.sequence
    s = sequence.sampling
    found = dict(s.logit_bias)
    if chunk.start + chunk.count - sequence.num_prompt < s.min_tokens:
        found.update(dict.fromkeys(sequence.stop_ids, -np.inf))
    for word in s.bad_words:
        head = list(word[:-1])
        if not head or sequence.token_ids[-len(head) :] == head:
            found[word[-1]] = -np.inf
    return found
