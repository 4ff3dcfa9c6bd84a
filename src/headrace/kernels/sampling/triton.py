"""Sampling on GPUs: rows in chunks over all multiprocessors, no sorting and no question to the device.

What top-k and top-p keep is found by descent: tokens are ordered by their distance to the row's best one, a fixed
point number of 7 digits to the base 16. Each level, a launch over all chunks, sums what is nearer than each of 16
edges, either tokens or their probabilities, and the next level goes into the digit where the sum passes the limit.
A chunk with no token in that digit does not read its logits again, so only the first few levels cost anything.

Everything about a row is summed in one order, whatever its neighbours are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.kernels.launch import INTERPRETED, launch_options
from headrace.kernels.sampling import Draws, Edits, Scores
from headrace.kernels.sampling.reference import scores
from headrace.kernels.step.triton import reduce_best

__all__ = ["draw_rows", "edit_rows", "forbid_rows", "score_rows"]

_CHUNK = 256 if INTERPRETED else 4096  # tokens of one program
_LEVELS = 7
_MAX_ID = (1 << 32) - 1
_FARTHEST = tl.constexpr(
    16**7 - 1
)  # the distance of all tokens with less than e^-32 of the best one's probability


@triton.jit(do_not_specialize=["R"])
def _edit(logits_ptr, logits_row, rows_ptr, bias_starts, bias_ids, bias_ptr, history_starts, history_ids, counts_ptr,
          penalties_ptr, R, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    i = tl.program_id(0)
    at = logits_ptr + tl.load(rows_ptr + i).to(tl.int64) * logits_row
    b = tl.arange(0, BLOCK)
    end = tl.load(bias_starts + i + 1)
    for start in range(tl.load(bias_starts + i), end, BLOCK):
        ok = start + b < end
        token = tl.load(bias_ids + start + b, mask=ok, other=0)
        x = tl.load(at + token, mask=ok, other=0.0) + tl.load(bias_ptr + start + b, mask=ok, other=0.0)
        tl.store(at + token, x, mask=ok)
    tl.debug_barrier()  # the loads below see the stores above
    repetition = tl.load(penalties_ptr + i)
    presence = tl.load(penalties_ptr + R + i)
    frequency = tl.load(penalties_ptr + 2 * R + i)
    end = tl.load(history_starts + i + 1)
    for start in range(tl.load(history_starts + i), end, BLOCK):
        ok = start + b < end
        token = tl.load(history_ids + start + b, mask=ok, other=0)
        count = tl.load(counts_ptr + start + b, mask=ok, other=0).to(tl.float32)
        x = tl.load(at + token, mask=ok, other=0.0)
        x = tl.where(x > 0, x / repetition, x * repetition)
        x -= tl.where(count > 0, presence + frequency * count, 0.0)
        tl.store(at + token, x, mask=ok)


def edit_rows(logits: Tensor, edits: Edits) -> None:
    num = edits.rows.shape[0]
    _edit[(num,)](
        logits, logits.stride(0), edits.rows, edits.bias_starts, edits.bias_ids, edits.bias, edits.history_starts,
        edits.history_ids, edits.history_counts, edits.penalties, num, BLOCK=32 if INTERPRETED else 512,
        **launch_options(logits.device, 8, 1),
    )  # fmt: skip


@triton.jit
def _forbid(logits_ptr, logits_row, rows_ptr, bits_ptr, bits_row, V, CHUNK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.load(rows_ptr + tl.program_id(0)).to(tl.int64)
    i = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    words = tl.load(bits_ptr + tl.program_id(0).to(tl.int64) * bits_row + i // 32, mask=i < V, other=-1)
    forbidden = ((words >> (i % 32)) & 1) == 0
    minus = tl.full([CHUNK], float("-inf"), tl.float32)
    tl.store(logits_ptr + row * logits_row + i, minus, mask=forbidden & (i < V))


def forbid_rows(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    vocab = logits.shape[1]
    assert bits.stride(1) == 1
    _forbid[(rows.shape[0], triton.cdiv(vocab, _CHUNK))](
        logits, logits.stride(0), rows, bits, bits.stride(0), vocab, CHUNK=_CHUNK,
        **launch_options(logits.device, 4, 1),
    )  # fmt: skip


@triton.jit
def _peaks(logits_ptr, logits_row, peaks_ptr, V, CHUNK: tl.constexpr, PDL: tl.constexpr):
    """Largest logit of each chunk."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits_ptr + row * logits_row + i, mask=i < V, other=float("-inf"))
    tl.store(peaks_ptr + row * tl.num_programs(1) + chunk, tl.max(x, 0))


@triton.jit
def _peak(peaks_ptr, row, NC, LANES: tl.constexpr):
    c = tl.arange(0, LANES)
    return tl.max(tl.load(peaks_ptr + row * NC + c, mask=c < NC, other=float("-inf")), 0)


@triton.jit
def _distances(x, peak, temperature):
    """How far logits lie below the best one, over the temperature: float, and in fixed point."""
    far = (peak - x) / tl.maximum(temperature, 1e-5)
    return far, tl.where(far < 31.999998, far * 8388608.0, 268435455.0).to(tl.int32)


@triton.jit
def _descend(parts_ptr, prefixes_ptr, limit, row, level, NC, LANES: tl.constexpr):
    """The digits up to those of ``level``: the largest distance so far that less than ``limit`` is nearer than."""
    c = tl.arange(0, LANES)[:, None]
    digit = tl.arange(0, 16)
    nearer = tl.sum(tl.load(parts_ptr + (row * NC + c) * 16 + digit[None, :], mask=c < NC, other=0.0), 0)
    chosen = tl.max(tl.where((nearer < limit) | (digit == 0), digit, 0), 0)
    return tl.load(prefixes_ptr + row * 8 + level) + (chosen << (24 - 4 * level)), chosen


@triton.jit
def _limit(norms_ptr, share, row, NC, LANES: tl.constexpr):
    c = tl.arange(0, LANES)
    return share * tl.sum(tl.load(norms_ptr + row * NC + c, mask=c < NC, other=0.0), 0)


@triton.jit(do_not_specialize=["level"])
def _descent(logits_ptr, logits_row, temperature_ptr, top_k_ptr, top_p_ptr, peaks_ptr, norms_ptr, kept_ptr,
             prefixes_ptr, before_ptr, parts_ptr, V, NC, level, MASS: tl.constexpr, CHUNK: tl.constexpr,
             LANES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """parts[row, chunk, digit] = tokens (MASS: the probabilities of those that top-k kept) nearer than each edge.

    ``prefixes`` int32 [P, 8]: the distance that each level starts from, and at last the largest one that is kept;
    ``kept``: those of top-k.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    if MASS:
        share = tl.load(top_p_ptr + row)
        wanted = share < 1.0
    else:
        share = tl.load(top_k_ptr + row).to(tl.float32)
        wanted = share > 0
    if wanted & (temperature > 0):
        here = (row * NC + chunk) * 16
        digit = tl.arange(0, 16)
        prefix = 0
        idle = False
        if level > 0:
            limit = share
            if MASS:
                limit = _limit(norms_ptr, share, row, NC, LANES)
            prefix, chosen = _descend(before_ptr, prefixes_ptr, limit, row, level - 1, NC, LANES)
            low = tl.load(before_ptr + here + chosen)
            high = tl.load(before_ptr + here + chosen + 1, mask=chosen < 15, other=-1.0)
            idle = low == high
            if idle:
                tl.store(parts_ptr + here + digit, low + tl.zeros([16], tl.float32))
        if chunk == 0:
            tl.store(prefixes_ptr + row * 8 + level, prefix)
        if not idle:
            i = chunk * CHUNK + tl.arange(0, CHUNK)
            x = tl.load(logits_ptr + row * logits_row + i, mask=i < V, other=float("-inf"))
            peak = _peak(peaks_ptr, row, NC, LANES)
            far, distance = _distances(x, peak, temperature)
            counts = x > float("-inf")
            weight = tl.where(counts, 1.0, 0.0)
            if MASS:
                counts = counts & (distance <= tl.load(kept_ptr + row * 8 + 7))
                weight = tl.where(counts, tl.exp(-far), 0.0)
                if level == 0:
                    tl.store(norms_ptr + row * NC + chunk, tl.sum(weight, 0))
            for j in range(16):
                edge = prefix + (j << (24 - 4 * level))
                tl.store(parts_ptr + here + j, tl.sum(tl.where(distance < edge, weight, 0.0), 0))


@triton.jit
def _conclude(top_k_ptr, top_p_ptr, norms_ptr, prefixes_ptr, parts_ptr, NC, MASS: tl.constexpr, LANES: tl.constexpr,
              PDL: tl.constexpr):  # fmt: skip
    """The largest distance that is kept, into the last column of the prefixes."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    if MASS:
        share = tl.load(top_p_ptr + row)
        wanted = share < 1.0
        limit = _limit(norms_ptr, share, row, NC, LANES)
    else:
        limit = tl.load(top_k_ptr + row).to(tl.float32)
        wanted = limit > 0
    distance, _ = _descend(parts_ptr, prefixes_ptr, limit, row, 6, NC, LANES)
    tl.store(prefixes_ptr + row * 8 + 7, tl.where(wanted, distance, _FARTHEST))


@triton.jit
def _murmur(state):
    state ^= state >> 16
    state *= 0x85EBCA6B
    state ^= state >> 13
    state *= 0xC2B2AE35
    return state ^ (state >> 16)


@triton.jit
def _arrival(token, key, key2):
    """Logarithm of race_times of the reference."""
    state = token.to(tl.uint32) * 0x9E3779B1 + key.to(tl.uint32, bitcast=True)
    state = _murmur(_murmur(state) ^ key2.to(tl.uint32, bitcast=True))
    u = ((state & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10
    # -log(1 - u), by its series where 1 - u would lose digits; the winners come from there.
    series = u * (1.0 + u * (0.5 + u * (0.3333333333 + u * (0.25 + u * 0.2))))
    return tl.log(tl.where(u < 0.02, series, -tl.log(1.0 - tl.minimum(u, 0.99999994))))


@triton.jit
def _race(logits_ptr, logits_row, temperature_ptr, min_p_ptr, keys_ptr, peaks_ptr, by_count_ptr, by_mass_ptr, tops_ptr,
          best_ptr, V, NC, FILTERED: tl.constexpr, CHUNK: tl.constexpr, LANES: tl.constexpr,
          PDL: tl.constexpr):  # fmt: skip
    """The winner of each chunk."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits_ptr + row * logits_row + i, mask=i < V, other=float("-inf"))
    bad = (x != x) | (x == float("inf"))
    if temperature > 0:
        value = x / tl.maximum(temperature, 1e-5)
        value -= _arrival(i, tl.load(keys_ptr + 2 * row), tl.load(keys_ptr + 2 * row + 1))
        if FILTERED:
            far, distance = _distances(x, _peak(peaks_ptr, row, NC, LANES), temperature)
            farthest = tl.minimum(tl.load(by_count_ptr + row * 8 + 7), tl.load(by_mass_ptr + row * 8 + 7))
            keep = (distance <= farthest) & (-far >= tl.log(tl.load(min_p_ptr + row)))
            value = tl.where(keep, value, float("-inf"))
        x = value
    x = tl.where(bad, float("inf"), x)
    top = tl.max(x, 0)
    tl.store(tops_ptr + row * NC + chunk, top)
    tl.store(best_ptr + row * NC + chunk, tl.min(tl.where(x == top, i, 2147483647), 0))


class _Search:
    """Scratch of one call, and the launches of a descent."""

    def __init__(self, logits: Tensor, draws: Draws) -> None:
        num, vocab = logits.shape
        self.logits, self.draws = logits, draws
        self.chunks = triton.cdiv(vocab, _CHUNK)
        self.shape = {"CHUNK": _CHUNK, "LANES": triton.next_power_of_2(self.chunks)}
        self.options = launch_options(logits.device, 4, 1)

        def empty(*sizes: int) -> Tensor:
            return torch.empty(num, *sizes, dtype=torch.float32, device=logits.device)

        self.peaks, self.norms = empty(self.chunks), empty(self.chunks)
        self.parts = (empty(self.chunks, 16), empty(self.chunks, 16))
        # The prefixes of both descents; without one, all tokens are kept.
        self.by_count, self.by_mass = torch.full(
            (2, num, 8), _FARTHEST.value, dtype=torch.int32, device=logits.device
        )
        grid = (num, self.chunks)
        _peaks[grid](logits, logits.stride(0), self.peaks, vocab, CHUNK=_CHUNK, **self.options)
        if draws.any_top_k:
            self.descend(mass=False)
        if draws.any_top_p:
            self.descend(mass=True)

    def descend(self, *, mass: bool) -> None:
        """Find the largest distance that top-k (``mass``: top-p) keeps of each row."""
        logits, draws = self.logits, self.draws
        num, vocab = logits.shape
        prefixes = self.by_mass if mass else self.by_count
        for level in range(_LEVELS):
            before, parts = self.parts[level % 2], self.parts[1 - level % 2]
            _descent[(num, self.chunks)](
                logits, logits.stride(0), draws.temperature, draws.top_k, draws.top_p, self.peaks, self.norms,
                self.by_count, prefixes, before, parts, vocab, self.chunks, level, MASS=mass,
                **self.shape, **self.options,
            )  # fmt: skip
        _conclude[(num,)](
            draws.top_k, draws.top_p, self.norms, prefixes, self.parts[_LEVELS % 2], self.chunks, MASS=mass,
            LANES=self.shape["LANES"], **self.options,
        )  # fmt: skip


def draw_rows(
    logits: Tensor, draws: Draws, *, last_tokens: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    num, vocab = logits.shape
    assert logits.stride(1) == 1 and logits.dtype == torch.float32
    chunks = triton.cdiv(vocab, _CHUNK)
    tops = torch.empty(num, chunks, dtype=torch.float32, device=logits.device)
    best = torch.empty(num, chunks, dtype=torch.int32, device=logits.device)
    search = None
    if draws.any_top_k or draws.any_top_p or draws.any_min_p:
        search = _Search(logits, draws)
    _race[(num, chunks)](
        logits, logits.stride(0), draws.temperature, draws.min_p, draws.keys, tops if search is None else search.peaks,
        best if search is None else search.by_count, best if search is None else search.by_mass, tops, best, vocab,
        chunks, FILTERED=search is not None, CHUNK=_CHUNK,
        LANES=triton.next_power_of_2(chunks), **launch_options(logits.device, 4, 1),
    )  # fmt: skip
    return reduce_best(tops, best, last_tokens=last_tokens, rows=rows)


@triton.jit
def _sums(logits_ptr, logits_row, peaks_ptr, norms_ptr, V, CHUNK: tl.constexpr, PDL: tl.constexpr):
    """Largest logit of each chunk, and the sum of exponentials beside it."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits_ptr + row * logits_row + i, mask=i < V, other=float("-inf"))
    peak = tl.max(x, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    to = row * tl.num_programs(1) + chunk
    tl.store(peaks_ptr + to, peak)
    tl.store(norms_ptr + to, tl.sum(tl.exp(x - base), 0))


@triton.jit
def _log_sum(peaks_ptr, norms_ptr, out_ptr, NC, LANES: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, LANES)
    peaks = tl.load(peaks_ptr + row * NC + c, mask=c < NC, other=float("-inf"))
    norms = tl.load(norms_ptr + row * NC + c, mask=c < NC, other=0.0)
    peak = tl.max(peaks, 0)
    tl.store(out_ptr + row, peak + tl.log(tl.sum(norms * tl.exp(peaks - peak), 0)))


def score_rows(logits: Tensor, tokens: Tensor, k: int) -> Scores:
    num, vocab = logits.shape
    chunks = triton.cdiv(vocab, _CHUNK)
    peaks, norms = torch.empty(2, num, chunks, dtype=torch.float32, device=logits.device)
    out = torch.empty(num, dtype=torch.float32, device=logits.device)
    options = launch_options(logits.device, 4, 1)
    _sums[(num, chunks)](logits, logits.stride(0), peaks, norms, vocab, CHUNK=_CHUNK, **options)
    _log_sum[(num,)](peaks, norms, out, chunks, LANES=triton.next_power_of_2(chunks), **options)
    # One order of all tokens, so that equal ones do not come out by chance: the logit, then the lower id.
    bits = logits.view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    order = (bits.long() << 32) + (_MAX_ID - torch.arange(vocab, device=logits.device))
    ids = _MAX_ID - (torch.topk(order, k, dim=-1).values & _MAX_ID)
    return scores(logits, out, tokens, ids)
