"""Linear maps of few rows over 4-bit codes on GPUs: codes become bfloat16 in registers, two columns an instruction.

A warp reads its weights straight into the registers of the tensor cores' operand (tiling.py lays them so, and x's
columns are read in the same order), 16 bytes a lane; nothing passes through shared memory but the sums at the end. The
warps of a program stand side by side in K, each over all of the program's rows, so that many small loads are under way
at once. Scales of FP4 multiply the decoded weights, exactly (2 + 4 significant bits); those of integers multiply sums
of their columns, in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.kernels.launch import INTERPRETED, launch_options, prefetch_l2
from headrace.kernels.linear.triton_parts import GATES as _GATES
from headrace.kernels.linear.triton_parts import SCRATCH as _SCRATCH
from headrace.kernels.quantized_linear.tiling import COLUMNS, ROWS
from headrace.kernels.quantized_linear.triton_fragments import (
    by_lane,
    decode_fp4,
    decode_integers,
    input_columns,
    input_rows,
    inputs,
    lane_offsets,
    operand,
    row_factors,
    tile_of,
)
from headrace.kernels.quantized_linear.triton_parts import finish, gather_parts
from headrace.kernels.quantized_linear.tuning import CodesShape, codes_shape, padded_rows

__all__ = ["code_sums", "four_bit_product"]

MAX_ROWS = 64


@triton.jit
def _block(k, which, hi, EVEN: tl.constexpr):
    """Block k + which; no further than the last."""
    block = k + which
    return block if EVEN else tl.minimum(block, hi - 1)


@triton.jit
def _halves(a, x, T: tl.constexpr, W: tl.constexpr, BM: tl.constexpr, SIZE: tl.constexpr):
    """Operands over SIZE columns -> those over the first and the last half of them."""
    a0, a1 = tl.split(a.reshape(W, 16 * T, 2, SIZE // 2).permute(0, 1, 3, 2))
    x0, x1 = tl.split(x.reshape(W, 2, SIZE // 2, BM).permute(0, 2, 3, 1))
    return a0, a1, x0, x1


@triton.jit
def _scaled_product(acc, a, x, w_scale_ptr, rows, col, groups, T: tl.constexpr, W: tl.constexpr, BM: tl.constexpr,
                    GROUP: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    """acc plus the product over SIZE columns from ``col`` [T W] on, under the scales of integers."""
    if SIZE > 32 and GROUP % SIZE != 0:
        a0, a1, x0, x1 = _halves(a, x, T, W, BM, SIZE)
        acc = _scaled_product(acc, a0, x0, w_scale_ptr, rows, col, groups, T, W, BM, GROUP, SIZE // 2)
        return _scaled_product(
            acc, a1, x1, w_scale_ptr, rows, col + SIZE // 2, groups, T, W, BM, GROUP, SIZE // 2
        )
    else:
        part = tl.dot(a, x, out_dtype=tl.float32, input_precision="ieee")
        return acc + part * row_factors(w_scale_ptr, rows, col, groups, T, W, BM, GROUP)


@triton.jit
def code_sums(x_ptr, x_row, m, w_ptr, w_scale_ptr, zero_ptr, tiles, tiles2, groups, lo, hi, K, blocks,
              BM: tl.constexpr, T: tl.constexpr, W: tl.constexpr, FP4: tl.constexpr, GROUP: tl.constexpr,
              SMALL: tl.constexpr, ZERO: tl.constexpr, EVEN: tl.constexpr, PLAIN: tl.constexpr,
              PDL: tl.constexpr):  # fmt: skip
    """Sums over ``blocks`` of 128 columns, lo .. hi, of T tiles of weights and BM rows of x: float32 [16 T, BM].

    Args:
        m: rows of x as ``input_rows`` lays them, all of which exist.
        tiles, tiles2: int64 [T W] and [2 T W], which tiles of 16 rows of the weights.
        EVEN: the warps' blocks end with hi, and hi with K. Else warps past the end read the last block again, of
            which no column of x is left.
        PDL: weights are read before the kernel before has ended.
    """
    parts, wide = tl.arange(0, T * W), tl.arange(0, 2 * T * W)
    SHARING: tl.constexpr = GROUP // 16 if FP4 else 1  # lanes that share a word of scales
    SCALES: tl.constexpr = 32 // SHARING
    w_from = w_ptr + (tiles2 * (blocks * 256) + wide // W % 2 * 128)[:, None] + tl.arange(0, 128)[None, :]
    s_from = w_scale_ptr + lane_offsets(tl.arange(0, 32) // SHARING, tiles * (blocks * SCALES))
    rows, rows2 = tiles * groups, tiles2 * groups
    near, near2 = parts % W, wide % W
    w = tl.load(w_from + (_block(lo, near2, hi, EVEN) * 256)[:, None])
    s = by_lane(s_from + (_block(lo, near, hi, EVEN) * SCALES)[None, None, :], T * W) if FP4 else w
    if PDL:
        if EVEN and lo + W < hi:  # uneven parts would ask for lines past the end
            lines = (tiles2 * blocks + lo + W + near2) * 256 + wide // W % 2 * 128
            prefetch_l2(w_ptr + lines[:, None] + (tl.arange(0, 4) * 32)[None, :])
        gdc_wait()
    E: tl.constexpr = 16 if FP4 else 8
    HALF: tl.constexpr = 8 if FP4 else 32
    cols = input_columns(lo, W, BM, E)
    x_from = tl.max_contiguous(tl.multiple_of(m * x_row + cols, (1, 8)), (1, 8))
    x_at = x_ptr
    eighth = tl.max_constancy(cols // 8, (1, 8))  # what the compiler then loads as one is there or not as one
    end = tl.minimum(hi * 128, K) // 8
    acc = tl.zeros([W, 16 * T, BM], tl.float32)
    for k in range(lo, hi, W):
        x0 = inputs(x_at + x_from, eighth, end, 0, EVEN)
        x1 = inputs(x_at + x_from, eighth, end, HALF, EVEN)
        x_at += W * 128
        end -= W * 16
        now, scales = w, s
        x = operand(x0, x1, W, BM)
        if k + W < hi:
            w = tl.load(w_from + (_block(k + W, near2, hi, EVEN) * 256)[:, None])
            if FP4:
                s = by_lane(s_from + (_block(k + W, near, hi, EVEN) * SCALES)[None, None, :], T * W)
            else:
                s = w
        if FP4:
            a = decode_fp4(now, scales, x.dtype, T, W, GROUP, SMALL, PLAIN)
            acc = tl.dot(a, x, acc, out_dtype=tl.float32, input_precision="ieee")
        else:
            a = decode_integers(now, zero_ptr, rows2, k, groups, x.dtype, T, W, GROUP, ZERO, PLAIN)
            col = (k + near) * 128
            acc = _scaled_product(acc, a, x, w_scale_ptr, rows, col, groups, T, W, BM, GROUP, 128)
    return tl.sum(acc, 0)


@triton.jit
def _small_codes(x_ptr, x_row, w_ptr, w_scale_ptr, zero_ptr, row_scale_ptr, groups, bias_ptr, res_ptr, out_ptr,
                 parts_ptr, arrivals_ptr, M, N, K, R, blocks,
                 BM: tl.constexpr, T: tl.constexpr, W: tl.constexpr, SPLITS: tl.constexpr, FP4: tl.constexpr,
                 GROUP: tl.constexpr, SMALL: tl.constexpr, ZERO: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr,
                 GATE: tl.constexpr, RESIDUAL: tl.constexpr, PLAIN: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """out[m, n] for BM rows and T tiles of 16 outputs, over one of SPLITS ranges of K; with a gate, of both halves.

    ``blocks`` of 128 columns, R tiles of rows in all; GROUP columns share one of ``groups`` scales.
    """
    if PDL:
        gdc_launch_dependents()
    tile = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    span = (blocks + SPLITS * W - 1) // (SPLITS * W) * W
    lo = split * span
    hi = tl.minimum(lo + span, blocks)
    parts, wide = tl.arange(0, T * W), tl.arange(0, 2 * T * W)
    tiles, tiles2 = tile_of(parts // W, tile, N, R, T, GATE), tile_of(wide // (2 * W), tile, N, R, T, GATE)
    m = tl.minimum(tl.program_id(1) * BM + input_rows(W, BM), M - 1)
    sums = code_sums(x_ptr, x_row, m, w_ptr, w_scale_ptr, zero_ptr, tiles, tiles2, groups, lo, hi, K, blocks,
                     BM, T, W, FP4, GROUP, SMALL, ZERO, EVEN, PLAIN, PDL)  # fmt: skip
    _store(sums, tile, split, row_scale_ptr, bias_ptr, res_ptr, out_ptr, parts_ptr, arrivals_ptr, M, N, R,
           BM, T, SPLITS, FP4, 65536.0 if GROUP == 16 and not PLAIN else 1.0, BIAS, GATE, RESIDUAL)  # fmt: skip


@triton.jit
def _store(y, tile, split, row_scale_ptr, bias_ptr, res_ptr, out_ptr, parts_ptr, arrivals_ptr, M, N, R,
           BM: tl.constexpr, T: tl.constexpr, SPLITS: tl.constexpr, FP4: tl.constexpr, UP: tl.constexpr,
           BIAS: tl.constexpr, GATE: tl.constexpr, RESIDUAL: tl.constexpr):  # fmt: skip
    """What follows the sums y [16 T, BM] of one range of K; row scales times UP."""
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    last = True
    sums = y
    if SPLITS > 1:
        slot = tile + tl.program_id(1) * (tl.num_programs(0) // SPLITS)
        all_m = tl.arange(0, BM)
        sums, _, last = gather_parts(y, y, parts_ptr, arrivals_ptr, slot, split, all_m, BM, 16 * T, SPLITS, 0)
    if last:
        if FP4:
            n = tl.arange(0, 16 * T)
            tall = tile_of(n // 16, tile, N, R, T, GATE) * 16 + n % 16
            ALL = N * 2 if GATE > 0 else N
            sums = sums * (tl.load(row_scale_ptr + tl.minimum(tall, ALL - 1)) * UP)[:, None]
        TALL: tl.constexpr = 8 * T if GATE > 0 else 16 * T
        outputs = tile * TALL + tl.arange(0, TALL)
        near = tl.minimum(outputs, N - 1)
        if GATE > 0:
            first, second = tl.split(sums.reshape(2, TALL, BM).permute(1, 2, 0))
        else:
            first, second = sums, sums
        finish(first, second, outputs, near, m, m < M, bias_ptr, res_ptr, out_ptr, N, BIAS, GATE, RESIDUAL)


def four_bit_product(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    *,
    rows: int,
    group: int,
    zero: Tensor | None = None,
    row_scale: Tensor | None = None,
    small: bool = False,
    bias: Tensor | None = None,
    gate: str | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype,
    shape: CodesShape | None = None,
) -> Tensor:
    """``act(x @ weight.T + bias) + residual`` with float32 sums, rounded once at the end.

    Args:
        x: [M, K], M at most MAX_ROWS.
        words, scale, zero, row_scale, group, small: of a quantization.tiled.TiledWeight; FP4 has a row_scale.
        rows: of the weight.
        gate: the first half of the outputs go through it and multiply the others; they are a multiple of 16.
    """
    num_rows, k = x.shape
    n = rows // (1 if gate is None else 2)
    tiles_of_rows, blocks = words.shape[0], words.shape[1] // 2
    fp4 = row_scale is not None
    assert (
        num_rows <= MAX_ROWS
        and x.stride(1) == 1
        and words.is_contiguous()
        and (gate is None or n % ROWS == 0)
    )
    assert k % 8 == 0
    shape = shape or codes_shape(x.device, num_rows, rows, k, fp4, gate is not None)
    bm = min(padded_rows(num_rows), 32)
    heights = triton.cdiv(num_rows, bm)
    warps = min(shape.warps, 1 << (blocks.bit_length() - 1))
    splits = min(shape.splits, max(1, blocks // warps))
    programs = triton.cdiv(n, shape.tiles * ROWS // (1 if gate is None else 2))
    out = torch.empty(num_rows, n, dtype=out_dtype, device=x.device)
    parts = arrivals = out
    if splits > 1:
        parts, arrivals = _SCRATCH.get(
            x.device, programs * heights * splits * shape.tiles * ROWS * bm, programs * heights
        )
    even = k == blocks * COLUMNS and blocks % (warps * splits) == 0
    _small_codes[(programs * splits, heights)](
        x, x.stride(0), words, scale, scale if zero is None else zero, scale if row_scale is None else row_scale,
        1 if fp4 else scale.shape[1], x if bias is None else bias, x if residual is None else residual,
        out, parts, arrivals, num_rows, n, k, tiles_of_rows, blocks,
        BM=bm, T=shape.tiles, W=warps, SPLITS=splits, FP4=fp4, GROUP=group, SMALL=small, ZERO=zero is not None,
        EVEN=even, BIAS=bias is not None, GATE=_GATES[gate], RESIDUAL=residual is not None,
        PLAIN=INTERPRETED or x.dtype is not torch.bfloat16, **launch_options(x.device, warps, 1),
    )  # fmt: skip
    return out
