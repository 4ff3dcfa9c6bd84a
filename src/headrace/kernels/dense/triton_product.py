"""Large products on Hopper with what follows them done before they are written: scales, bias, activation.

Tiles come through the tensor memory accelerator. A program takes tiles one after another (persistent), so that the
loads of its next tile run while it finishes and writes the last one. cuBLAS is a little faster at the product alone;
what is won is one pass over its result (H200, 16,384 x 1,024 x 4,096 with bias and gelu: 617 against 515 TFLOP/s). A
gate of two products did not pay (551 against 595).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from headrace.kernels.activation.triton import ACTIVATION_CODES, activated
from headrace.kernels.launch import INTERPRETED, num_multiprocessors, supports_pdl

__all__ = ["MIN_ROWS", "Shape", "fused_product", "takes"]

MIN_ROWS = 8192  # with 4096 cuBLAS and a second pass take as long (H200), and are launched in half the time


class Shape(NamedTuple):
    """A tile's rows, columns and depth; tiles in a column of the walk; programs a multiprocessor; warps; stages."""

    rows: int
    columns: int
    depth: int
    group: int = 8
    programs: int = 1
    warps: int = 8
    stages: int = 3
    halves: bool = True  # writes a tile in two halves, which takes half the shared memory


@triton.jit
def _finish(acc, xs_ptr, ws_ptr, bias_ptr, factor, m, n, M, N, NAME: tl.constexpr, SCALED: tl.constexpr,
            BIAS: tl.constexpr, FACTOR: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """act(acc * scale of its row * scale of its column + bias) * factor, float32 [HIGH, WIDE].

    SCALED: 1: one scale for all rows; 2: one a row.
    """
    at = n + tl.arange(0, WIDE)
    if SCALED > 0:
        column = tl.load(ws_ptr + at, mask=at < N, other=0.0)
        acc = acc.to(tl.float32)
        if SCALED == 2:
            rows = m + tl.arange(0, HIGH)
            acc = acc * tl.load(xs_ptr + rows, mask=rows < M, other=0.0)[:, None]
        else:
            column = column * tl.load(xs_ptr)
        acc = acc * column[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + at, mask=at < N, other=0.0).to(tl.float32)[None, :]
    acc = activated(acc, NAME)
    return acc * factor if FACTOR else acc


@triton.jit
def _product(x_desc, w_desc, out_desc, xs_ptr, ws_ptr, bias_ptr, factor, M, N, K, BM: tl.constexpr, BN: tl.constexpr,
             BK: tl.constexpr, GROUP: tl.constexpr, NAME: tl.constexpr, SUM: tl.constexpr, SCALED: tl.constexpr,
             BIAS: tl.constexpr, FACTOR: tl.constexpr, HALVES: tl.constexpr):  # fmt: skip
    """out = act(x @ w.T * scales + bias) * factor."""
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        first = tile // (GROUP * tiles_n) * GROUP
        high = tl.minimum(tiles_m - first, GROUP)
        within = tile % (GROUP * tiles_n)
        m = (first + within % high) * BM
        n = (within // high) * BN
        acc = tl.zeros([BM, BN], SUM)
        for k in range(0, K, BK):
            acc = tl.dot(x_desc.load([m, k]), w_desc.load([n, k]).T, acc, out_dtype=SUM)
        if HALVES:
            HALF: tl.constexpr = BN // 2
            left, right = tl.split(tl.permute(tl.reshape(acc, [BM, 2, HALF]), [0, 2, 1]))
            left = _finish(
                left, xs_ptr, ws_ptr, bias_ptr, factor, m, n, M, N, NAME, SCALED, BIAS, FACTOR, BM, HALF
            )
            out_desc.store([m, n], left.to(out_desc.dtype))
            n += HALF
            right = _finish(
                right, xs_ptr, ws_ptr, bias_ptr, factor, m, n, M, N, NAME, SCALED, BIAS, FACTOR, BM, HALF
            )
            out_desc.store([m, n], right.to(out_desc.dtype))
        else:
            acc = _finish(
                acc, xs_ptr, ws_ptr, bias_ptr, factor, m, n, M, N, NAME, SCALED, BIAS, FACTOR, BM, BN
            )
            out_desc.store([m, n], acc.to(out_desc.dtype))


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether `fused_product` multiplies these, and is the faster way."""
    device = supports_pdl(x.device) or INTERPRETED  # Hopper has both
    even = x.shape[1] % 8 == 0 and weight.shape[0] % 16 == 0
    return device and x.shape[0] >= MIN_ROWS and x.itemsize == 2 and even and x.is_contiguous()


def fused_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    *,
    scales: tuple[Tensor, Tensor] | None = None,
    out_dtype: torch.dtype | None = None,
    factor: float | None = None,
    shape: Shape | None = None,
) -> Tensor:
    """``activation(x @ weight.T * scales + bias) * factor``.

    Args:
        x: [M, K], contiguous, K a multiple of 8.
        weight: [N, K], contiguous, N a multiple of 16.
        bias: [N].
        scales: of rows (float32 [M, 1], or [1, 1] for all) and columns ([N]) of 8-bit numbers, int8 or float8_e4m3fn.
        factor: None: 1.
    Returns:
        [M, N] of ``out_dtype``, or else of x's type.
    """
    rows, inner = x.shape
    columns = weight.shape[0]
    out = torch.empty(rows, columns, dtype=out_dtype or x.dtype, device=x.device)
    given = shape or _shape(x, out)
    bm, bn, bk = given.rows, given.columns, given.depth
    xs, ws = scales if scales is not None else (x, x)
    tiles = triton.cdiv(rows, bm) * triton.cdiv(columns, bn)
    _product[(min(tiles, num_multiprocessors(x.device) * given.programs),)](
        TensorDescriptor.from_tensor(x, [bm, bk]),
        TensorDescriptor.from_tensor(weight, [bn, bk]),
        TensorDescriptor.from_tensor(out, [bm, bn // 2 if given.halves else bn]),
        xs, ws, weight if bias is None else bias, factor or 0.0, rows, columns, inner, BM=bm, BN=bn, BK=bk,
        GROUP=given.group, NAME=ACTIVATION_CODES[activation] if activation else 0,
        SCALED=0 if scales is None else 1 if xs.shape[0] == 1 else 2,
        SUM=tl.int32 if x.dtype is torch.int8 else tl.float32, BIAS=bias is not None, FACTOR=factor is not None,
        HALVES=given.halves,
        num_warps=given.warps, num_stages=given.stages,
    )  # fmt: skip
    return out


def _shape(x: Tensor, out: Tensor) -> Shape:
    if INTERPRETED:
        return Shape(16, 32, 16, 4, 1, 4, 1)
    if x.itemsize == 2:
        return Shape(128, 256, 64, halves=False)
    if out.itemsize == 1:  # H200, 16,384 x 1,024 x 4,096 with gelu: 146 us; the shape below: 160
        return Shape(128, 256, 128, halves=False)
    # Two programs a multiprocessor: one multiplies while the other scales and writes.
    return Shape(128, 128, 128, programs=2, warps=4)
