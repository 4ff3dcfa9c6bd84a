"""A linear map whose every row is summed in one order, for any number of rows (deterministic mode).

K is cut into spans that depend on the weight's shape alone; a row's result is the sum of each span, and those added
in order. Few rows: a program a span, and the last one to arrive adds. Many rows: a program takes one span after the
other. Tiles follow the number of rows: an element of a product does not depend on the tile that it is in, since each
step along K is one instruction of the tensor cores whatever the tile (tests/parity/test_triton_linear.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.kernels.launch import INTERPRETED, Scratch, launch_options, prefetch_l2

__all__ = ["fixed_linear"]

_GRAIN = 128  # spans are multiples of it
_PROGRAMS = 132  # about as many as a large GPU has multiprocessors


class _Tile(NamedTuple):
    """``bm`` rows of x, ``bn`` outputs, ``bk`` columns a load."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int


@triton.jit
def _products(
    w_at, x_at, lo, hi, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr
):
    """Sums over the columns [lo, hi), [BN, BM]."""
    cols = tl.arange(0, BK)
    acc = tl.zeros([BN, BM], tl.float32)
    for k in range(lo, hi, BK):
        if EVEN:
            w = tl.load(w_at + k)
            x = tl.load(x_at + k)
        else:
            ok = k + cols < K
            w = tl.load(w_at + k, mask=ok[None, :], other=0.0)
            x = tl.load(x_at + k, mask=ok[:, None], other=0.0)
        acc = tl.dot(w, x, acc, out_dtype=tl.float32, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["M"])
def _fixed(x_ptr, x_row, w_ptr, out_ptr, bias_ptr, parts_ptr, arrivals_ptr, M, N, K, span, BM: tl.constexpr,
           BN: tl.constexpr, BK: tl.constexpr, SPANS: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr,
           EVEN: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """out[m, n] for BM rows and BN columns; SPLIT: of one span."""
    if PDL:
        gdc_launch_dependents()
    split = 0
    tile = tl.program_id(0)
    if SPLIT:
        split = tile % SPANS
        tile = tile // SPANS
    n = tile * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    cols = tl.arange(0, BK)
    # Rows past the end repeat the last one: no mask on the loads.
    w_at = w_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + cols[None, :]
    x_at = x_ptr + tl.minimum(m, M - 1).to(tl.int64)[None, :] * x_row + cols[:, None]
    lo = split * span
    if PDL:
        lines = tl.arange(0, BK // 32) * 32
        ahead = w_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
        for k in range(lo, tl.minimum(tl.minimum(lo + span, K), lo + 4 * BK), BK):
            prefetch_l2(ahead + tl.minimum(k + lines, K - 1)[None, :])
        gdc_wait()
    acc = _products(w_at, x_at, lo, tl.minimum(lo + span, K), K, BM, BN, BK, EVEN)
    last = True
    if SPLIT:
        # parts: [tiles, SPANS, BN, BM]
        place = tl.program_id(1) * (tl.num_programs(0) // SPANS) + tile
        at = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        base = parts_ptr + place.to(tl.int64) * (SPANS * BN * BM)
        tl.store(base + split * (BN * BM) + at, acc)
        tl.debug_barrier()
        last = tl.atomic_add(arrivals_ptr + place, 1, sem="acq_rel", scope="gpu") == SPANS - 1
        if last:
            tl.debug_barrier()
            acc = tl.load(base + at, cache_modifier=".cg")
            for i in tl.static_range(1, SPANS):
                acc += tl.load(base + i * (BN * BM) + at, cache_modifier=".cg")
            tl.store(arrivals_ptr + place, 0)
    elif SPANS > 1:
        for first in range(span, K, span):
            acc += _products(w_at, x_at, first, tl.minimum(first + span, K), K, BM, BN, BK, EVEN)
    if last:
        if BIAS:
            acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        to = out_ptr + m[None, :].to(tl.int64) * N + n[:, None]
        tl.store(to, acc.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])


def _num_spans(n: int, k: int) -> int:
    """How often K is cut: until few rows keep the device busy, but never to spans that are not worth a program."""
    spans = 1
    while -(-n // 64) * spans < _PROGRAMS and spans < 8 and k >= spans * 2 * 2 * _GRAIN:
        spans *= 2
    return spans


def _tile(num_rows: int, k: int, itemsize: int) -> _Tile:
    if INTERPRETED or itemsize == 4 or k < _GRAIN:
        return _Tile(32 if num_rows > 16 else 16, 64, 64 if itemsize < 4 else 32, 4, 2)
    if num_rows > 256:
        return _Tile(128, 128, 64, 8, 3)
    bm = 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64
    return _Tile(bm, 64, 128, 4, 4 if bm < 64 else 3)


_SCRATCH = Scratch()


def fixed_linear(x: Tensor, weight: Tensor, *, bias: Tensor | None = None) -> Tensor:
    assert x.stride(1) == 1 and weight.is_contiguous()
    (num_rows, k), n = x.shape, weight.shape[0]
    out = torch.empty(num_rows, n, dtype=x.dtype, device=x.device)
    spans, tile = _num_spans(n, k), _tile(num_rows, k, x.element_size())
    tiles, row_tiles = triton.cdiv(n, tile.bn), triton.cdiv(num_rows, tile.bm)
    split = spans > 1 and tiles * row_tiles < _PROGRAMS
    parts, arrivals = x, x
    if split:
        count = tiles * row_tiles
        parts, arrivals = _SCRATCH.get(x.device, count * spans * tile.bn * tile.bm, count)
    _fixed[(tiles * (spans if split else 1), row_tiles)](
        x, x.stride(0), weight, out, x if bias is None else bias, parts, arrivals, num_rows, n, k,
        triton.cdiv(k, spans * _GRAIN) * _GRAIN, BM=tile.bm, BN=tile.bn, BK=tile.bk, SPANS=spans, SPLIT=split,
        BIAS=bias is not None, EVEN=k % tile.bk == 0, **launch_options(x.device, tile.warps, tile.stages),
    )  # fmt: skip
    return out
