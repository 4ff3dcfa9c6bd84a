"""Products with the chosen experts' weights in 4 bits, which become 16 bits in registers.

Weights are laid out and decoded as for dense layers (kernels/quantized_linear/triton_codes.py), the tiles of one expert
behind those of the one before; rows are found through the plan.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.kernels.experts.plan import ExpertPlan
from headrace.kernels.experts.triton_parts import GATES, block_of, rows_of, store
from headrace.kernels.experts.tuning import MANY, WIDE, ExpertCodesShape, codes_rows, codes_shape
from headrace.kernels.launch import INTERPRETED, launch_options
from headrace.kernels.quantized_linear.tiling import COLUMNS, ROWS
from headrace.kernels.quantized_linear.triton_codes import code_sums
from headrace.kernels.quantized_linear.triton_fragments import (
    decode_fp4,
    decode_integers,
    found_rows,
    tile_of,
)
from headrace.kernels.quantized_linear.tuning import covers_wide

__all__ = ["expert_codes"]


@triton.jit
def _scaled_rows(
    sums, tile, first, row_scale_ptr, N, R, T: tl.constexpr, GATE: tl.constexpr, UP: tl.constexpr
):
    """Sums [16 T, BM] times the scales of their rows and UP."""
    n = tl.arange(0, 16 * T)
    row = tile_of(n // 16, tile, N, R, T, GATE) * 16 + n % 16
    return (
        sums
        * (tl.load(row_scale_ptr + first + tl.minimum(row, (2 * N if GATE > 0 else N) - 1)) * UP)[:, None]
    )


@triton.jit
def _store_sums(sums, tile, first, pair, bias_ptr, out_ptr, P, N, T: tl.constexpr, BM: tl.constexpr,
                BIAS: tl.constexpr, GATE: tl.constexpr):  # fmt: skip
    """What follows sums [16 T, BM], with a gate those of both halves."""
    TALL: tl.constexpr = 8 * T if GATE > 0 else 16 * T
    outputs = tile * TALL + tl.arange(0, TALL)
    if GATE > 0:
        acc, acc2 = tl.split(sums.reshape(2, TALL, BM).permute(1, 2, 0))
    else:
        acc, acc2 = sums, sums
    store(acc, acc2, first, outputs, pair, bias_ptr, out_ptr, P, N, BIAS, GATE)


@triton.jit(do_not_specialize=["P"])
def _few_codes(x_ptr, x_row, w_ptr, w_scale_ptr, zero_ptr, row_scale_ptr, groups, bias_ptr, out_ptr, pairs_ptr,
               contents_ptr, P, N, K, R, blocks, tiles_of_n, SHARED: tl.constexpr, ROWS: tl.constexpr,
               BM: tl.constexpr, T: tl.constexpr, W: tl.constexpr, FP4: tl.constexpr, GROUP: tl.constexpr,
               SMALL: tl.constexpr, ZERO: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr,
               PLAIN: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """out[pair, n] for BM of the ROWS pairs of a block and T tiles of 16 outputs; with a gate, of both halves.

    R tiles of rows an expert; ``blocks`` of 128 columns.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tile, block = tl.program_id(0) % tiles_of_n, tl.program_id(0) // tiles_of_n
    expert, count = block_of(contents_ptr, block)
    count -= tl.program_id(1) * BM
    if count > 0:
        at = pairs_ptr + block * ROWS + tl.program_id(1) * BM
        own = expert.to(tl.int64) * R
        parts, wide = tl.arange(0, T * W), tl.arange(0, 2 * T * W)
        tiles = own + tile_of(parts // W, tile, N, R, T, GATE)
        tiles2 = own + tile_of(wide // (2 * W), tile, N, R, T, GATE)
        m = found_rows(at, count, W, BM) // SHARED
        sums = code_sums(x_ptr, x_row, m, w_ptr, w_scale_ptr, zero_ptr, tiles, tiles2, groups, 0, blocks, K, blocks,
                         BM, T, W, FP4, GROUP, SMALL, ZERO, EVEN, PLAIN, False)  # fmt: skip
        first = expert.to(tl.int64) * (2 * N if GATE > 0 else N)
        if FP4:
            UP: tl.constexpr = 65536.0 if GROUP == 16 and not PLAIN else 1.0
            sums = _scaled_rows(sums, tile, first, row_scale_ptr, N, R, T, GATE, UP)
        pair = tl.load(at + tl.arange(0, BM), mask=tl.arange(0, BM) < count, other=P)
        _store_sums(sums, tile, first, pair, bias_ptr, out_ptr, P, N, T, BM, BIAS, GATE)


@triton.jit
def _natural(a, T: tl.constexpr, FP4: tl.constexpr):
    """Decoded weights [1, 16 T, 128] in the order of columns (they come in that of tiling.py), [16 T, 128]."""
    a = a.reshape(
        16 * T, 2, 2, 2, 4, 2, 2
    )  # parts of a column: chunk, i in halves with a and t between them, b
    if FP4:
        ordered = a.permute(0, 1, 4, 2, 5, 3, 6)
    else:
        ordered = a.permute(0, 1, 2, 4, 5, 3, 6)
    return ordered.reshape(16 * T, 128)


@triton.jit(do_not_specialize=["P"])
def _many_codes(x_ptr, x_row, w_ptr, w_scale_ptr, zero_ptr, row_scale_ptr, groups, bias_ptr, out_ptr, pairs_ptr,
                contents_ptr, P, N, K, R, blocks, tiles_of_n, SHARED: tl.constexpr, BM: tl.constexpr,
                T: tl.constexpr, FP4: tl.constexpr, GROUP: tl.constexpr, SMALL: tl.constexpr, ZERO: tl.constexpr,
                EVEN: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr, PLAIN: tl.constexpr,
                PDL: tl.constexpr):  # fmt: skip
    """As _few_codes for the BM pairs of a block: decoded weights pass through shared memory once for all of them."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tile, block = tl.program_id(0) % tiles_of_n, tl.program_id(0) // tiles_of_n
    expert, count = block_of(contents_ptr, block)
    if count > 0:
        pair, rows = rows_of(pairs_ptr, block, count, P, BM, SHARED)
        own = expert.to(tl.int64) * R
        one, wide = tl.arange(0, T), tl.arange(0, 2 * T)
        tiles, tiles2 = own + tile_of(one, tile, N, R, T, GATE), own + tile_of(wide // 2, tile, N, R, T, GATE)
        w_at = w_ptr + ((tiles2 * blocks * 2 + wide % 2) * 128)[:, None] + tl.arange(0, 128)[None, :]
        SHARING: tl.constexpr = GROUP // 16 if FP4 else 1  # lanes that share a word of scales
        s_at = (
            w_scale_ptr + (tiles * blocks * (32 // SHARING))[:, None] + (tl.arange(0, 32) // SHARING)[None, :]
        )
        cols = tl.arange(0, 128)
        x_at = x_ptr + rows.to(tl.int64)[None, :] * x_row + cols[:, None]
        tall = tl.arange(0, 16 * T)
        tile_row = own + tile_of(tall // 16, tile, N, R, T, GATE)
        acc = tl.zeros([16 * T, BM], tl.float32)
        for k in range(blocks):
            if EVEN:
                x = tl.load(x_at + k * 128)
            else:
                x = tl.load(x_at + k * 128, mask=(k * 128 + cols < K)[:, None], other=0.0)
            w = tl.load(w_at + k * 256)
            if FP4:
                a = decode_fp4(w, tl.load(s_at + k * (32 // SHARING)), x.dtype, T, 1, GROUP, SMALL, PLAIN)
                a = _natural(a, T, FP4)
            else:
                a = decode_integers(
                    w, zero_ptr, tiles2 * groups, k, groups, x.dtype, T, 1, GROUP, ZERO, PLAIN
                )
                group = tl.minimum(
                    (k * 128 + tl.arange(0, 4) * 32) // GROUP, groups - 1
                )  # of each 32 columns
                factor = tl.load(
                    w_scale_ptr + (tile_row[:, None] * groups + group[None, :]) * 16 + (tall % 16)[:, None]
                )
                factor = tl.broadcast_to(factor[:, :, None], (16 * T, 4, 32)).reshape(16 * T, 128)
                a = (_natural(a, T, FP4).to(tl.float32) * factor).to(x.dtype)
            acc = tl.dot(a, x, acc, out_dtype=tl.float32, input_precision="ieee")
        first = expert.to(tl.int64) * (2 * N if GATE > 0 else N)
        if FP4:
            UP: tl.constexpr = 65536.0 if GROUP == 16 and not PLAIN else 1.0
            acc = _scaled_rows(acc, tile, first, row_scale_ptr, N, R, T, GATE, UP)
        _store_sums(acc, tile, first, pair, bias_ptr, out_ptr, P, N, T, BM, BIAS, GATE)


def expert_codes(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    plan: ExpertPlan,
    *,
    rows: int,
    group: int,
    zero: Tensor | None = None,
    row_scale: Tensor | None = None,
    small: bool = False,
    bias: Tensor | None = None,
    gate: str | None = None,
    shape: ExpertCodesShape | None = None,
) -> Tensor:
    """``expert_linear`` over weights of 4 bits.

    Args:
        words, scale, zero, row_scale, group, small: of a quantization.tiled.TiledWeight; FP4 has a row_scale.
        rows: of all experts' weights; those of one are a multiple of 16, with a gate each half of them.
    """
    k = x.shape[1]
    each = rows // plan.num_experts
    n = each // (1 if gate is None else 2)
    blocks, fp4 = words.shape[1] // 2, row_scale is not None
    assert plan.pairs is not None and plan.contents is not None and x.stride(1) == 1 and words.is_contiguous()
    assert each % ROWS == 0 and (gate is None or n % ROWS == 0) and k % 8 == 0
    most = min(plan.block, plan.chosen.shape[0])  # an expert has no more rows than there are tokens
    shape = shape or codes_shape(
        x.device, codes_rows(plan.num_pairs, plan.num_experts, plan.block), plan.block, most, each, k, group,
        gated=gate is not None, itemsize=x.itemsize, wide=fp4 and covers_wide(x, group, small),
    )  # fmt: skip
    if shape.kind == WIDE:
        from headrace.kernels.experts import gluon_codes

        assert row_scale is not None
        return gluon_codes.expert_wide_codes(
            x, words, scale, row_scale, plan, rows=rows, group=group, bias=bias, gate=gate, shape=shape
        )
    halves = 1 if gate is None else 2
    tiles = triton.cdiv(n, shape.tiles * ROWS // halves)
    out = torch.empty(plan.num_pairs, n, dtype=x.dtype, device=x.device)
    tensors = (
        x, x.stride(0), words, scale, scale if zero is None else zero, scale if row_scale is None else row_scale,
        1 if fp4 else scale.shape[1], x if bias is None else bias, out, plan.pairs, plan.contents, plan.num_pairs,
    )  # fmt: skip
    common: dict[str, Any] = {
        "SHARED": plan.num_pairs // x.shape[0], "BM": shape.bm, "T": shape.tiles, "FP4": fp4, "GROUP": group,
        "SMALL": small, "ZERO": zero is not None, "BIAS": bias is not None, "GATE": GATES[gate],
        "PLAIN": INTERPRETED or x.dtype is not torch.bfloat16,
    }  # fmt: skip
    sizes = (n, k, each // ROWS, blocks, tiles)
    grid, whole = tiles * plan.contents.numel(), k == blocks * COLUMNS
    if shape.kind == MANY:
        assert shape.bm == plan.block
        _many_codes[(grid,)](
            *tensors, *sizes, EVEN=whole, **common, **launch_options(x.device, shape.warps, shape.stages)
        )
        return out
    assert shape.bm <= plan.block
    _few_codes[(grid, triton.cdiv(most, shape.bm))](
        *tensors, *sizes, ROWS=plan.block, W=shape.warps, EVEN=whole and blocks % shape.warps == 0,
        **common, **launch_options(x.device, shape.warps, 1),
    )  # fmt: skip
    return out
