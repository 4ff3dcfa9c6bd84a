"""Routing on GPUs: the k largest of a row, and pairs sorted by expert into blocks of rows of one expert each.

Nothing is read back by the host, and grids depend on the number of tokens only: both can be parts of a CUDA graph.
Up to CHUNK tokens one program sorts; above, one a chunk counts, one adds up, and one a chunk places. Pairs of an expert
stay in their order, so that nothing depends on timing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.kernels.experts.plan import ExpertPlan
from headrace.kernels.experts.tuning import block_rows, max_blocks
from headrace.kernels.launch import launch_options

__all__ = ["plan_experts", "route"]

CHUNK = 64
_LOWEST = tl.constexpr(-3.0e38)


@triton.jit(do_not_specialize=["T"])
def _route(logits_ptr, logits_row, weights_ptr, chosen_ptr, T, E, TOP: tl.constexpr, BT: tl.constexpr,
           BE: tl.constexpr, RENORMALIZE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """BT tokens; NaN counts as the lowest number, and what is taken as lower than that."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    e = tl.arange(0, BE)
    there = (t < T)[:, None] & (e < E)[None, :]
    at = logits_ptr + t.to(tl.int64)[:, None] * logits_row + e[None, :]
    x = tl.load(at, mask=there, other=0.0).to(tl.float32)
    wrong = tl.max(tl.where(there & (x != x), 1, 0), 1) > 0
    key = tl.where(there, tl.where(x == x, tl.maximum(x, _LOWEST), _LOWEST), float("-inf"))
    top = tl.max(key, 1)
    total = tl.zeros([BT], tl.float32)
    if not RENORMALIZE:
        total = tl.sum(tl.where(there, tl.exp(x - top[:, None]), 0.0), 1)
    rest = key
    for i in tl.static_range(TOP):
        best = tl.max(rest, 1)
        first = tl.min(tl.where(rest == best[:, None], e[None, :], BE), 1)
        tl.store(chosen_ptr + t * TOP + i, first, mask=t < T)
        if RENORMALIZE:
            total += tl.exp(best - top)
        rest = tl.where(e[None, :] == first[:, None], float("-inf"), rest)
    rest = key
    for i in tl.static_range(TOP):
        best = tl.max(rest, 1)
        first = tl.min(tl.where(rest == best[:, None], e[None, :], BE), 1)
        weight = tl.where(wrong, float("nan"), tl.exp(best - top) / total)
        tl.store(weights_ptr + t * TOP + i, weight, mask=t < T)
        rest = tl.where(e[None, :] == first[:, None], float("-inf"), rest)


@triton.jit
def _slots(chosen_ptr, t, e, T, TOP: tl.constexpr, CHUNK: tl.constexpr, BE: tl.constexpr):
    """Which of a token's experts each one is, -1 for none: int32 [CHUNK, BE]."""
    slots = tl.full([CHUNK, BE], -1, tl.int32)
    for i in tl.static_range(TOP):
        chosen = tl.load(chosen_ptr + t * TOP + i, mask=t < T, other=-1)
        slots = tl.where(chosen[:, None] == e[None, :], i, slots)
    return slots


@triton.jit
def _lay_out(counts, e, contents_ptr, E, blocks, BM: tl.constexpr, BE: tl.constexpr):
    """Where each expert's rows begin, int32 [BE]; writes what each block holds."""
    each = (counts + BM - 1) // BM
    first = tl.cumsum(each, 0) - each
    for i in range(tl.max(each, 0)):
        rows = tl.minimum(counts - i * BM, BM)
        tl.store(contents_ptr + first + i, e + rows * 65536, mask=i < each)
    for i in range(tl.sum(each, 0), blocks, BE):
        tl.store(contents_ptr + i + e, E, mask=i + e < blocks)
    return first * BM


@triton.jit
def _before(counts, ROWS: tl.constexpr):
    """Sums of the rows before each, of int32 [ROWS, BE] up to 64: exact on tensor cores, and faster than a scan."""
    if ROWS < 16:
        before = tl.cumsum(counts, 0) - counts
    else:
        r = tl.arange(0, ROWS)
        lower = (r[:, None] > r[None, :]).to(tl.float16)
        before = tl.dot(lower, counts.to(tl.float16), out_dtype=tl.float32).to(tl.int32)
    return before


@triton.jit
def _place(slots, start, t, pairs_ptr, TOP: tl.constexpr, CHUNK: tl.constexpr):
    """Write the pairs of a chunk, those of each expert from ``start`` [BE] on."""
    here = slots >= 0
    at = start[None, :] + _before(here.to(tl.int32), CHUNK)
    tl.store(pairs_ptr + at, t[:, None] * TOP + slots, mask=here)


@triton.jit(do_not_specialize=["T", "blocks"])
def _plan_few(chosen_ptr, pairs_ptr, contents_ptr, T, E, blocks, TOP: tl.constexpr, BM: tl.constexpr,
              CHUNK: tl.constexpr, BE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """All of it for one chunk of tokens."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    t, e = tl.arange(0, CHUNK), tl.arange(0, BE)
    slots = _slots(chosen_ptr, t, e, T, TOP, CHUNK, BE)
    counts = tl.sum((slots >= 0).to(tl.int32), 0)
    start = _lay_out(counts, e, contents_ptr, E, blocks, BM, BE)
    _place(slots, start, t, pairs_ptr, TOP, CHUNK)


@triton.jit(do_not_specialize=["T"])
def _count(chosen_ptr, counts_ptr, T, TOP: tl.constexpr, CHUNK: tl.constexpr, BE: tl.constexpr,
           PDL: tl.constexpr):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    t, e = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK), tl.arange(0, BE)
    slots = _slots(chosen_ptr, t, e, T, TOP, CHUNK, BE)
    tl.store(counts_ptr + tl.program_id(0) * BE + e, tl.sum((slots >= 0).to(tl.int32), 0))


@triton.jit(do_not_specialize=["blocks", "chunks"])
def _add_up(counts_ptr, starts_ptr, contents_ptr, E, blocks, chunks, BM: tl.constexpr, BE: tl.constexpr,
            ROWS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Counts [chunks, BE] become what chunks before have of each expert, which begins at starts [BE]."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    e, c = tl.arange(0, BE), tl.arange(0, ROWS)
    counts = tl.zeros([BE], tl.int32)
    for i in range(0, chunks, ROWS):
        at = counts_ptr + (i + c)[:, None] * BE + e[None, :]
        ok = (i + c < chunks)[:, None]
        some = tl.load(at, mask=ok, other=0)
        tl.store(at, _before(some, ROWS) + counts[None, :], mask=ok)
        counts += tl.sum(some, 0)
    tl.store(starts_ptr + e, _lay_out(counts, e, contents_ptr, E, blocks, BM, BE))


@triton.jit(do_not_specialize=["T"])
def _place_many(chosen_ptr, counts_ptr, starts_ptr, pairs_ptr, T, TOP: tl.constexpr, CHUNK: tl.constexpr,
                BE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    t, e = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK), tl.arange(0, BE)
    slots = _slots(chosen_ptr, t, e, T, TOP, CHUNK, BE)
    start = tl.load(starts_ptr + e) + tl.load(counts_ptr + tl.program_id(0) * BE + e)
    _place(slots, start, t, pairs_ptr, TOP, CHUNK)


def route(logits: Tensor, experts_per_token: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
    """See the package."""
    num_tokens, num_experts = logits.shape
    assert logits.stride(1) == 1 and experts_per_token <= num_experts
    weights = torch.empty(num_tokens, experts_per_token, dtype=torch.float32, device=logits.device)
    chosen = torch.empty(num_tokens, experts_per_token, dtype=torch.int32, device=logits.device)
    bt = 4
    _route[(triton.cdiv(num_tokens, bt),)](
        logits, logits.stride(0), weights, chosen, num_tokens, num_experts, TOP=experts_per_token, BT=bt,
        BE=triton.next_power_of_2(num_experts), RENORMALIZE=renormalize, **launch_options(logits.device, 4, 1),
    )  # fmt: skip
    return weights, chosen


def plan_experts(chosen: Tensor, num_experts: int) -> ExpertPlan:
    """See the package."""
    (num_tokens, top), device = chosen.shape, chosen.device
    bm = block_rows(chosen.numel(), num_experts)
    blocks = max_blocks(chosen.numel(), num_experts, bm)
    pairs = torch.empty(blocks * bm, dtype=torch.int32, device=device)
    contents = torch.empty(blocks, dtype=torch.int32, device=device)
    be = max(16, triton.next_power_of_2(num_experts))
    if num_tokens <= CHUNK:
        chunk = max(4, triton.next_power_of_2(num_tokens))
        _plan_few[(1,)](
            chosen, pairs, contents, num_tokens, num_experts, blocks, TOP=top, BM=bm, CHUNK=chunk, BE=be,
            **launch_options(device, 8 if chunk >= 32 else 4, 1),
        )  # fmt: skip
        return ExpertPlan(chosen, num_experts, bm, pairs, contents)
    options = launch_options(device, 8, 1)
    chunks = triton.cdiv(num_tokens, CHUNK)
    counts = torch.empty(chunks, be, dtype=torch.int32, device=device)
    starts = torch.empty(be, dtype=torch.int32, device=device)
    _count[(chunks,)](chosen, counts, num_tokens, TOP=top, CHUNK=CHUNK, BE=be, **options)
    _add_up[(1,)](counts, starts, contents, num_experts, blocks, chunks, BM=bm, BE=be, ROWS=32, **options)
    _place_many[(chunks,)](chosen, counts, starts, pairs, num_tokens, TOP=top, CHUNK=CHUNK, BE=be, **options)
    return ExpertPlan(chosen, num_experts, bm, pairs, contents)
