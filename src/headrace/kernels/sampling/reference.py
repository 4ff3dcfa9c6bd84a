"""Sampling in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.config.plan.scratch import DRAW_ELEMENTS
from headrace.kernels.sampling import Draws, Edits, Scores

__all__ = ["draw_rows", "edit_rows", "forbid_rows", "race_times", "score_rows", "scores"]

_GOLDEN = -1640531535  # 2^32 over the golden ratio, as int32
_CANDIDATES = 512  # most likely tokens looked at before a full sort is paid for


def edit_rows(logits: Tensor, edits: Edits) -> None:
    repetition, presence, frequency = edits.penalties
    bias_ends, history_ends = edits.bias_starts.tolist(), edits.history_starts.tolist()
    for i, row in enumerate(edits.rows.tolist()):
        span = slice(bias_ends[i], bias_ends[i + 1])
        logits[row, edits.bias_ids[span].long()] += edits.bias[span]
        span = slice(history_ends[i], history_ends[i + 1])
        ids, counts = edits.history_ids[span].long(), edits.history_counts[span]
        seen = logits[row, ids]
        seen = torch.where(seen > 0, seen / repetition[i], seen * repetition[i])
        logits[row, ids] = seen - torch.where(counts > 0, presence[i] + frequency[i] * counts, 0.0)


def forbid_rows(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = ((bits[:, :, None] >> shifts) & 1).view(len(rows), -1)[:, : logits.shape[1]]
    at = rows.long()
    logits[at] = logits[at].masked_fill_(allowed == 0, -torch.inf)


def draw_rows(
    logits: Tensor, draws: Draws, *, last_tokens: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    drawn = draws.temperature.nonzero()[:, 0]
    tokens = _argmax(logits) if len(drawn) < len(logits) else torch.empty_like(drawn)
    for some in drawn.split(max(1, DRAW_ELEMENTS // logits.shape[1])) if len(drawn) else ():
        scaled = logits if len(some) == len(logits) else logits[some]
        scaled = scaled / draws.temperature[some].clamp(min=1e-5)[:, None]
        if draws.any_top_k or draws.any_top_p or draws.any_min_p:
            floor = _floor(scaled, draws.top_k[some], draws.top_p[some], draws.min_p[some])
            scaled.masked_fill_(scaled < floor[:, None], -torch.inf)
        tokens[some] = _argmax(scaled.sub_(race_times(draws.keys[some], logits.shape[1]).log_()))
    if last_tokens is not None:
        assert rows is not None
        last_tokens[rows.long()] = tokens
    return tokens


def score_rows(logits: Tensor, tokens: Tensor, k: int) -> Scores:
    return scores(logits, torch.logsumexp(logits, -1), tokens, torch.topk(logits, k).indices)


def scores(logits: Tensor, norms: Tensor, tokens: Tensor, ids: Tensor) -> Scores:
    """See score_rows.

    Args:
        norms: float32 [P], the logarithm of each row's sum of exponentials.
        ids: int64 [P, k], the most likely tokens.
    """
    own = logits.gather(1, tokens.clamp(min=0)[:, None])
    ranks = (logits > own).sum(-1, dtype=torch.int32) + 1  # an int64 sum would first copy all of it
    return Scores(own[:, 0] - norms, ranks, ids, logits.gather(1, ids) - norms[:, None])


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


def _argmax(logits: Tensor) -> Tensor:
    values, tokens = logits.max(dim=-1)
    return torch.where(torch.isfinite(values), tokens, -1)


def _floor(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The smallest logit that each row keeps. logits [R, V] -> [R]."""
    vocab = logits.shape[1]
    k = torch.where((top_k > 0) & (top_k < vocab), top_k, vocab).long()
    limited = bool((k < vocab).all())
    best = torch.topk(logits, int(k.max()) if limited else min(_CANDIDATES, vocab), dim=-1).values
    if not limited:
        # Are the candidates all that a row can need? Else sort everything.
        mass = torch.exp(best.logsumexp(-1) - logits.logsumexp(-1))
        short = torch.where(k < vocab, k > best.shape[1], (top_p < 1.0) & (mass <= top_p + 1e-4))
        if short.any():
            best = torch.sort(logits, dim=-1, descending=True).values
    columns = torch.arange(best.shape[1], device=logits.device)
    kept = best.masked_fill(columns >= k[:, None], -torch.inf)
    norm = kept.logsumexp(-1)
    if not limited:
        norm = torch.where(k >= vocab, logits.logsumexp(-1), norm)
    probs = torch.exp(kept - norm[:, None])
    before = probs.cumsum(-1) - probs
    kept = kept.masked_fill((before >= top_p[:, None]) & (top_p < 1.0)[:, None], -torch.inf)
    finite = torch.where(torch.isinf(kept), torch.inf, kept).amin(-1)
    floor = torch.where((k >= vocab) & (top_p >= 1.0), torch.full_like(finite, -torch.inf), finite)
    return torch.maximum(floor, best[:, 0] + torch.log(min_p))
