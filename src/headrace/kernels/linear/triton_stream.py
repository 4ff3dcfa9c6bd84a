"""Linear maps around a residual stream, for tens to hundreds of rows, as fast as the weights can be read.

Weights and rows come through Hopper's copy engine, with the weights on the wide side of the product. The RMS norm
between two maps takes no kernel and no place in the loop: the map that completes a row also writes it times the
next norm's gain, and the sums of its squares by tile; the map that reads it multiplies its sums by
``1 / sqrt(mean + eps)``. K is split over programs where N alone does not fill the device; the last to arrive adds
the parts in order, so results do not depend on timing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from headrace.kernels.launch import INTERPRETED, launch_options, supports_gluon, supports_pdl
from headrace.kernels.linear.triton_parts import GATES, SCRATCH, ask_l2, finish, gather_parts, tell_largest
from headrace.kernels.linear.tuning import RingShape, StreamShape, ring_shape, stream_shape
from headrace.kernels.step.triton import reduce_best

__all__ = [
    "Stream",
    "add_linear",
    "begin_stream",
    "stream_argmax",
    "stream_covers",
    "stream_linear",
    "stream_takes_one_row",
]


@dataclass(slots=True)
class Stream:
    """Rows between two maps.

    Attributes:
        x: [M, D], the residual stream.
        scaled: [M, D], x times the next norm's gain.
        squares: float32 [P, M], sums of x's squares by part of D.
    """

    x: Tensor
    scaled: Tensor
    squares: Tensor


def stream_covers(weight: Tensor) -> bool:
    """Whether these kernels take this weight [N, K], on this device."""
    if not weight.is_contiguous() or weight.shape[1] % 8 or weight.data_ptr() % 16:
        return False
    return INTERPRETED or (weight.element_size() == 2 and supports_pdl(weight.device))


@triton.jit
def _begin_stream(x_ptr, gain_ptr, out_ptr, squares_ptr, D, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    gain = tl.load(gain_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * D + d, (x * gain).to(out_ptr.dtype.element_ty), mask=d < D)
    tl.store(squares_ptr + row, tl.sum(x * x, 0))


def begin_stream(x: Tensor, gain: Tensor) -> Stream:
    """x [M, D] contiguous as a Stream before a norm with this gain."""
    rows, width = x.shape
    scaled = torch.empty_like(x)
    squares = torch.empty(1, rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    options = launch_options(x.device, max(1, min(16, block // 512)), 1)
    _begin_stream[(rows,)](x, gain, scaled, squares, width, BLOCK=block, **options)
    return Stream(x, scaled, squares)


@triton.jit
def _product(w, x, acc, X_FIRST: tl.constexpr):
    if X_FIRST:
        acc = tl.dot(x, tl.trans(w), acc, out_dtype=tl.float32, input_precision="ieee")
    else:
        acc = tl.dot(w, tl.trans(x), acc, out_dtype=tl.float32, input_precision="ieee")
    return acc


@triton.jit
def _stream(
    x_desc, w_desc, w_ptr, out_ptr, bias_ptr, res_ptr, best_ptr, squares_ptr, next_gain_ptr, next_ptr,
    next_squares_ptr, parts_ptr, arrivals_ptr, M, N, K, num_squares, eps,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, SQUARES: tl.constexpr,
    BIAS: tl.constexpr, GATE: tl.constexpr, RESIDUAL: tl.constexpr, NEXT: tl.constexpr, ARGMAX: tl.constexpr,
    X_FIRST: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[m, n] for a tile of rows and columns, over one of SPLITS ranges of K. SQUARES > 0: a norm came before."""
    if PDL:
        gdc_launch_dependents()
    num_m = (M + BM - 1) // BM
    num_n = tl.num_programs(0) // num_m // SPLITS
    # Some tiles of rows over the same weights are neighbours in time: all but the first find them in L2.
    GROUP: tl.constexpr = 16
    group = tl.program_id(0) // (GROUP * num_n * SPLITS)
    place = tl.program_id(0) % (GROUP * num_n * SPLITS)
    height = tl.minimum(num_m - group * GROUP, GROUP)
    m_tile = group * GROUP + place % height
    tile = place // height // SPLITS
    split = place // height % SPLITS
    rows = tile * BN + tl.arange(0, BN)
    near = tl.minimum(rows, N - 1)
    m = m_tile * BM + tl.arange(0, BM)
    m_ok = m < M
    span = (K + SPLITS * BK - 1) // (SPLITS * BK) * BK
    lo = split * span
    hi = tl.minimum(lo + span, K)
    if PDL:
        ask_l2(w_ptr, near, lo, hi, N, K, BK, AHEAD, GATE)
        gdc_wait()
    ROWS: tl.constexpr = BM if X_FIRST else BN
    COLS: tl.constexpr = BN if X_FIRST else BM
    acc = tl.zeros([ROWS, COLS], tl.float32)
    acc2 = tl.zeros([ROWS, COLS], tl.float32)
    for k in range(lo, hi, BK):
        w = w_desc.load([tile * BN, k])
        x = x_desc.load([m_tile * BM, k])
        acc = _product(w, x, acc, X_FIRST)
        if GATE > 0:
            acc2 = _product(w_desc.load([N + tile * BN, k]), x, acc2, X_FIRST)
    if X_FIRST:
        acc = tl.trans(acc)
        acc2 = tl.trans(acc2)
    last = True
    if SPLITS > 1:
        place = tile * num_m + m_tile  # of this tile's counter and parts
        i_m = tl.arange(0, BM)
        acc, acc2, last = gather_parts(
            acc, acc2, parts_ptr, arrivals_ptr, place, split, i_m, BM, BN, SPLITS, GATE
        )
    if last:
        if SQUARES > 0:
            p = tl.arange(0, SQUARES)
            parts_ok = (p < num_squares)[:, None] & m_ok[None, :]
            squares = tl.load(squares_ptr + p[:, None] * M + m[None, :], mask=parts_ok, other=0.0)
            scale = tl.rsqrt(tl.sum(squares, 0) / K + eps)[None, :]
            acc = acc * scale
            acc2 = acc2 * scale
        if ARGMAX:
            tell_largest(acc, rows, m, m_ok, out_ptr, best_ptr, N, tile, num_n)
        else:
            y = finish(acc, acc2, rows, near, m, m_ok, bias_ptr, res_ptr, out_ptr, N, BIAS, GATE, RESIDUAL)
            if NEXT:
                ok = (rows < N)[:, None] & m_ok[None, :]
                at = m[None, :].to(tl.int64) * N + rows[:, None]
                wide = tl.where(ok, y.to(tl.float32), 0.0)
                gain = tl.load(next_gain_ptr + near).to(tl.float32)
                tl.store(next_ptr + at, (wide * gain[:, None]).to(next_ptr.dtype.element_ty), mask=ok)
                tl.store(next_squares_ptr + tile * M + m, tl.sum(wide * wide, 0), mask=m_ok)


def _launch(
    x: Tensor, weight: Tensor, out: Tensor, shape: StreamShape | RingShape, *, squares: Tensor | None, eps: float,
    bias: Tensor | None = None, gate: str | None = None, residual: Tensor | None = None, best: Tensor | None = None,
    following: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """``following``: the next norm's gain, and where scaled rows and squares go."""
    num_rows, k = x.shape
    n = weight.shape[0] // (1 if gate is None else 2)
    num_m, tiles = triton.cdiv(num_rows, shape.bm), triton.cdiv(n, shape.bn)
    parts, arrivals = x, x
    if shape.splits > 1:
        height = (1 if gate is None else 2) * shape.bn
        parts, arrivals = SCRATCH.get(
            x.device, tiles * num_m * shape.splits * height * shape.bm, tiles * num_m
        )
    gain, scaled, sums = following if following is not None else (x, x, x)
    tensors = (
        out, x if bias is None else bias, x if residual is None else residual, x if best is None else best,
        x if squares is None else squares, gain, scaled, sums, parts, arrivals,
    )  # fmt: skip
    numbers = (num_rows, n, k, 0 if squares is None else squares.shape[0], eps)
    flags: dict[str, Any] = {
        "SQUARES": 0 if squares is None else triton.next_power_of_2(squares.shape[0]), "BIAS": bias is not None,
        "GATE": GATES[gate], "RESIDUAL": residual is not None, "NEXT": following is not None,
        "ARGMAX": best is not None,
    }  # fmt: skip
    if isinstance(shape, RingShape):
        from headrace.kernels.linear import gluon_ring

        gluon_ring.launch(x, weight, shape, tiles * shape.splits, *tensors, *numbers, **flags)
        return
    w_desc = TensorDescriptor(weight, list(weight.shape), [k, 1], [shape.bn, shape.bk])
    x_desc = TensorDescriptor(x, [num_rows, k], [x.stride(0), 1], [shape.bm, shape.bk])
    _stream[(num_m * tiles * shape.splits,)](
        x_desc, w_desc, weight, *tensors, *numbers, BM=shape.bm, BN=shape.bn, BK=shape.bk, SPLITS=shape.splits,
        X_FIRST=bool(shape.x_first), AHEAD=shape.ahead, **flags,
        **launch_options(x.device, shape.warps, shape.stages),
    )  # fmt: skip


def stream_takes_one_row(weight: Tensor, gated: bool) -> bool:
    """Whether one row was measured to be faster here than in small_linear."""
    n, k = weight.shape
    return supports_gluon(weight.device) and ring_shape(weight.device, 1, n, k, gated) is not None


def _shape(x: Tensor, weight: Tensor, gated: bool) -> StreamShape | RingShape:
    (n, k), rows = weight.shape, x.shape[0]
    if supports_gluon(x.device):
        from headrace.kernels.linear import gluon_ring

        ring = ring_shape(x.device, rows, n, k, gated)
        if ring is not None and gluon_ring.covers(x, weight, ring):
            return ring
    return stream_shape(x.device, rows, n, k, gated)


def stream_linear(
    x: Tensor | Stream,
    weight: Tensor,
    *,
    eps: float = 0.0,
    bias: Tensor | None = None,
    gate: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``act(x @ weight.T + bias)`` of rows [M, K], or of a Stream after the norm that it stands before.

    Returns:
        [M, N], or [M, N / 2] with a gate (see small_linear).
    """
    rows = x.scaled if isinstance(x, Stream) else x
    squares = x.squares if isinstance(x, Stream) else None
    n = weight.shape[0] // (1 if gate is None else 2)
    out = torch.empty(rows.shape[0], n, dtype=out_dtype or rows.dtype, device=rows.device)
    shape = _shape(rows, weight, gate is not None)
    _launch(rows, weight, out, shape, squares=squares, eps=eps, bias=bias, gate=gate)
    return out


def add_linear(
    x: Tensor, weight: Tensor, stream: Stream, gain: Tensor, *, bias: Tensor | None = None
) -> Stream:
    """``stream.x + x @ weight.T + bias`` as a Stream before a norm with this gain."""
    num_rows, n = x.shape[0], weight.shape[0]
    shape = _shape(x, weight, False)
    out, scaled = torch.empty_like(stream.x), torch.empty_like(stream.x)
    squares = torch.empty(triton.cdiv(n, shape.bn), num_rows, dtype=torch.float32, device=x.device)
    _launch(
        x, weight, out, shape, squares=None, eps=0.0, bias=bias, residual=stream.x,
        following=(gain, scaled, squares),
    )  # fmt: skip
    return Stream(out, scaled, squares)


def stream_argmax(
    stream: Stream,
    weight: Tensor,
    *,
    eps: float,
    last_tokens: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Index of the largest product of each normed row, int64 [M], as argmax_linear."""
    num_rows = stream.x.shape[0]
    n = weight.shape[0]
    shape = _shape(stream.scaled, weight, False)._replace(splits=1)
    tiles = triton.cdiv(n, shape.bn)
    top = torch.empty(num_rows, tiles, dtype=torch.float32, device=weight.device)
    best = torch.empty(num_rows, tiles, dtype=torch.int32, device=weight.device)
    _launch(stream.scaled, weight, top, shape, squares=stream.squares, eps=eps, best=best)
    return reduce_best(top, best, last_tokens=last_tokens, rows=rows)
