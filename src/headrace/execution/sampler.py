"""Logits to tokens, one independent row a sequence.

A row's token depends on its logits, its parameters, its seed and its position, and on nothing else in the batch.
Random rows run a race: token i arrives after E_i / p_i, with E_i exponential and a pure function of (seed, position,
i), and the first wins. That is a draw from p (the Gumbel-max trick, Maddison et al. 2014), and it stays the same draw
when rounding differs: with logits 1e-5 apart, one number through the inverse of the cumulative distribution gives
another token in 1 of 100 draws over 49,152 tokens (each boundary between two of them moves), a race in 1 of 100,000.

Order of operations: logit bias and masks, penalties, temperature, top-k, top-p, min-p (that of transformers).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headrace.config.plan.scratch import DRAW_ELEMENTS
from headrace.scheduling.plan import Chunk
from headrace.scheduling.sequence import Sequence
from headrace.types import TokenLogprobs

__all__ = ["Masks", "Sampled", "Sampler", "race_keys", "race_times"]

_GOLDEN = -1640531535  # 2^32 over the golden ratio, as int32
_CANDIDATES = 512  # most likely tokens looked at before a full sort is paid for


@dataclass(slots=True)
class Masks:
    """Allowed tokens of some rows, on the device.

    Attributes:
        rows: int64 [M], rows of the logits.
        bits: int32 [M, ceil(V / 32)], little-endian; a set bit allows its token.
    """

    rows: Tensor
    bits: Tensor

    def forbid(self, logits: Tensor) -> None:
        """Set what is not allowed to -inf, in ``logits`` [P, V]."""
        shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
        allowed = ((self.bits[:, :, None] >> shifts) & 1).view(len(self.rows), -1)[:, : logits.shape[1]]
        logits[self.rows] = logits[self.rows].masked_fill_(allowed == 0, -torch.inf)


@dataclass(slots=True)
class Sampled:
    """Tokens of one step, still on the device.

    Attributes:
        tokens: int64 [P]; -1 where the logits were not finite.
        logprobs: for the rows that asked: row -> (log-probability, rank, top ids, top log-probabilities).
    """

    tokens: Tensor
    logprobs: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]]


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


def race_times(keys: Tensor, vocab: int) -> Tensor:
    """Exponential numbers by key and token: Murmur3's finalizer, twice, over the token's number (Appleby 2011).

    Args:
        keys: int32 [R, 2].

    Returns:
        float32 [R, vocab], above 0.
    """
    state = torch.arange(vocab, dtype=torch.int32, device=keys.device) * _GOLDEN + keys[:, :1]
    for word in (keys[:, 1:], 0):
        state ^= (state >> 16) & 0xFFFF
        state *= -2048144789
        state ^= (state >> 13) & 0x7FFFF
        state *= -1028477387
        state ^= (state >> 16) & 0xFFFF
        state ^= word
    numbers = (state & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return numbers.neg_().log1p_().neg_()


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


class Sampler:
    """Sampling parameters by row, and the arithmetic.

    Args:
        max_num_seqs: rows.
        device: where the logits are.
    """

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self.device = device
        self.temperature = np.ones(max_num_seqs, np.float32)
        self.top_k = np.zeros(max_num_seqs, np.int64)
        self.top_p = np.ones(max_num_seqs, np.float32)
        self.min_p = np.zeros(max_num_seqs, np.float32)
        self.seed = np.zeros(max_num_seqs, np.uint64)

    def admit(self, sequence: Sequence) -> None:
        """Set a row up for a sequence that begins to run."""
        s, row = sequence.sampling, sequence.row
        self.temperature[row] = s.temperature
        self.top_k[row] = max(s.top_k, 0)
        self.top_p[row] = s.top_p
        self.min_p[row] = s.min_p
        self.seed[row] = np.uint64(sequence.seed & 0xFFFFFFFFFFFFFFFF)

    def sample(self, logits: Tensor, chunks: list[Chunk], masks: Masks | None = None) -> Sampled:
        """One token for each chunk.

        Args:
            logits: float32 [P, V], changed in place.
            chunks: the P chunks that sample, in order.
            masks: of rows whose next token is constrained.
        """
        logprobs = self._logprob_source(logits, chunks)
        for i, chunk in enumerate(chunks):
            _adjust(logits[i], chunk)
        if masks is not None:
            masks.forbid(logits)
        rows = np.fromiter((c.row for c in chunks), np.int64, len(chunks))
        temperature = self.temperature[rows]
        greedy = np.flatnonzero(temperature == 0.0)
        if len(greedy) == len(chunks):
            tokens = _argmax(logits)
        else:
            tokens = torch.empty(len(chunks), dtype=torch.int64, device=self.device)
            drawn = np.flatnonzero(temperature != 0.0)
            if len(greedy):
                at = self._to_device(greedy)
                tokens[at] = _argmax(logits[at])
            at = self._to_device(drawn)
            positions = np.fromiter((chunks[i].start + chunks[i].count for i in drawn), np.int64, len(drawn))
            subset = logits if len(drawn) == len(chunks) else logits[at]
            tokens[at] = self._draw(subset, rows[drawn], positions)
        return Sampled(tokens, {i: _logprobs_of(lp, tokens[i], k) for i, (lp, k) in logprobs.items()})

    def _draw(self, logits: Tensor, rows: np.ndarray, positions: np.ndarray) -> Tensor:
        """Temperature, filters and a race a row, for some rows at a time. logits [R, V] -> int64 [R]."""
        at_once = max(1, DRAW_ELEMENTS // logits.shape[1])
        if len(rows) > at_once:
            parts = [slice(first, first + at_once) for first in range(0, len(rows), at_once)]
            return torch.cat([self._draw(logits[part], rows[part], positions[part]) for part in parts])
        logits = logits / self._to_device(np.maximum(self.temperature[rows], 1e-5))[:, None]
        top_k, top_p, min_p = self.top_k[rows], self.top_p[rows], self.min_p[rows]
        filtered = np.flatnonzero((top_k > 0) | (top_p < 1.0) | (min_p > 0.0))
        if len(filtered):
            at = self._to_device(filtered)
            subset = logits[at]
            floor = self._floor(subset, top_k[filtered], top_p[filtered], min_p[filtered])
            logits[at] = subset.masked_fill_(subset < floor[:, None], -torch.inf)
        keys = self._to_device(race_keys(self.seed[rows], positions))
        return _argmax(logits.sub_(race_times(keys, logits.shape[1]).log_()))

    def _floor(self, logits: Tensor, top_k: np.ndarray, top_p: np.ndarray, min_p: np.ndarray) -> Tensor:
        """The smallest logit that each row keeps. logits [R, V] -> [R]."""
        vocab = logits.shape[1]
        k = np.where((top_k > 0) & (top_k < vocab), top_k, vocab)
        need = int(k.max()) if (k < vocab).all() else min(_CANDIDATES, vocab)
        best = torch.topk(logits, need, dim=-1).values
        if not (k < vocab).all() and (top_p < 1.0).any():
            # Are the candidates all that top-p can need? Else sort everything.
            mass = torch.exp(best.logsumexp(-1) - logits.logsumexp(-1)).cpu().numpy()
            open_rows = (k >= vocab) & (top_p < 1.0)
            if (mass[open_rows] <= top_p[open_rows] + 1e-4).any():
                best = torch.sort(logits, dim=-1, descending=True).values
        columns = torch.arange(best.shape[1], device=self.device)
        limit = self._to_device(k)
        kept = best.masked_fill(columns >= limit[:, None], -torch.inf)
        unlimited = limit >= vocab
        norm = torch.where(unlimited, logits.logsumexp(-1), kept.logsumexp(-1))
        probs = torch.exp(kept - norm[:, None])
        before = probs.cumsum(-1) - probs
        p = self._to_device(top_p)
        kept = kept.masked_fill((before >= p[:, None]) & (p < 1.0)[:, None], -torch.inf)
        finite = torch.where(torch.isinf(kept), torch.inf, kept).amin(-1)
        floor = torch.where(unlimited & (p >= 1.0), torch.full_like(finite, -torch.inf), finite)
        peak = best[:, 0] + torch.log(self._to_device(min_p))
        return torch.maximum(floor, peak)

    def _logprob_source(self, logits: Tensor, chunks: list[Chunk]) -> dict[int, tuple[Tensor, int]]:
        """Log-probabilities [V] before any adjustment, of the rows that want them."""
        wanted = {i: c.sequence.sampling.logprobs for i, c in enumerate(chunks)}
        return {i: (torch.log_softmax(logits[i], -1), k) for i, k in wanted.items() if k is not None}

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)


def _argmax(logits: Tensor) -> Tensor:
    values, tokens = logits.max(dim=-1)
    return torch.where(torch.isfinite(values), tokens, -1)


def _adjust(logits: Tensor, chunk: Chunk) -> None:
    """Bias, masks and penalties of one row [V], in place."""
    sequence = chunk.sequence
    s = sequence.sampling
    if s.logit_bias:
        ids = torch.tensor(list(s.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(s.logit_bias.values()), dtype=logits.dtype, device=logits.device)
    num_output = chunk.start + chunk.count - sequence.num_prompt
    if num_output < s.min_tokens and sequence.stop_ids:
        logits[torch.tensor(sorted(sequence.stop_ids), device=logits.device)] = -torch.inf
    for word in s.bad_words:
        head = list(word[:-1])
        if not head or sequence.token_ids[-len(head) :] == head:
            logits[word[-1]] = -torch.inf
    if s.repetition_penalty != 1.0:
        ids = torch.tensor(sorted(set(sequence.token_ids)), device=logits.device)
        seen = logits[ids]
        logits[ids] = torch.where(seen > 0, seen / s.repetition_penalty, seen * s.repetition_penalty)
    if s.presence_penalty or s.frequency_penalty:
        output = torch.tensor(
            sequence.token_ids[sequence.num_prompt :], dtype=torch.int64, device=logits.device
        )
        ids, counts = torch.unique(output, return_counts=True)
        logits[ids] -= s.presence_penalty + s.frequency_penalty * counts.to(logits.dtype)


def _logprobs_of(logprobs: Tensor, token: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    own = logprobs[token]
    rank = (logprobs > own).sum() + 1
    values, ids = torch.topk(logprobs, k) if k else (logprobs[:0], torch.empty(0, dtype=torch.int64))
    return own, rank, ids, values


def token_logprobs(token: int, facts: tuple[Tensor, Tensor, Tensor, Tensor]) -> TokenLogprobs:
    """Facts of `Sampled.logprobs` as the message type; waits for the device."""
    own, rank, ids, values = facts
    return TokenLogprobs(token, float(own), int(rank), tuple(zip(ids.tolist(), values.tolist())))
