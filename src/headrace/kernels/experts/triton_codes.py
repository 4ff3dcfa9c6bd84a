"""Products with the chosen experts' weights in 4 bits, which become 16 bits in registers.

Weights are laid out and decoded as for dense layers (kernels/quantized_linear/triton_codes.py), the tiles of one expert
behind those of the one before; rows are found through the plan.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.kernels.experts.plan import ExpertPlan
from headrace.kernels.experts.triton_parts import GATES, store
from headrace.kernels.experts.tuning import ExpertCodesShape, codes_shape
from headrace.kernels.launch import INTERPRETED, launch_options
from headrace.kernels.quantized_linear.tiling import COLUMNS, ROWS
from headrace.kernels.quantized_linear.triton_codes import code_sums
from headrace.kernels.quantized_linear.triton_fragments import input_rows, tile_of

__all__ = ["expert_codes"]


@triton.jit(do_not_specialize=["P", "M"])
def _expert_codes(x_ptr, x_row, w_ptr, w_scale_ptr, zero_ptr, row_scale_ptr, groups, bias_ptr, out_ptr, pairs_ptr,
                  experts_ptr, P, M, E, N, K, R, blocks, tiles_of_n, SHARED: tl.constexpr, ROWS: tl.constexpr,
                  BM: tl.constexpr, T: tl.constexpr, W: tl.constexpr, FP4: tl.constexpr, GROUP: tl.constexpr,
                  ZERO: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr,
                  PLAIN: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """out[pair, n] for BM of the ROWS pairs of a block and T tiles of 16 outputs; with a gate, of both halves.

    M rows of x; R tiles of rows an expert; ``blocks`` of 128 columns.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tile, block = tl.program_id(0) % tiles_of_n, tl.program_id(0) // tiles_of_n
    expert = tl.load(experts_ptr + block)
    at = pairs_ptr + block * ROWS + tl.program_id(1) * BM
    if expert < E and tl.load(at) < P:
        own = expert.to(tl.int64) * R
        parts, wide = tl.arange(0, T * W), tl.arange(0, 2 * T * W)
        tiles = own + tile_of(parts // W, tile, N, R, T, GATE)
        tiles2 = own + tile_of(wide // (2 * W), tile, N, R, T, GATE)
        pair = tl.load(at + input_rows(W, BM))
        m = tl.where(pair < P, pair // SHARED, M)
        sums = code_sums(x_ptr, x_row, m, M, w_ptr, w_scale_ptr, zero_ptr, tiles, tiles2, groups, 0, blocks, K, blocks,
                         BM, T, W, FP4, GROUP, ZERO, EVEN, PLAIN, False)  # fmt: skip
        HALVES: tl.constexpr = 2 if GATE > 0 else 1
        first = expert.to(tl.int64) * (N * HALVES)
        if FP4:
            n = tl.arange(0, 16 * T)
            row = tile_of(n // 16, tile, N, R, T, GATE) * 16 + n % 16
            UP: tl.constexpr = 65536.0 if GROUP == 16 and not PLAIN else 1.0
            sums = sums * (tl.load(row_scale_ptr + first + tl.minimum(row, N * HALVES - 1)) * UP)[:, None]
        TALL: tl.constexpr = 16 * T // HALVES
        outputs = tile * TALL + tl.arange(0, TALL)
        if GATE > 0:
            acc, acc2 = tl.split(sums.reshape(2, TALL, BM).permute(1, 2, 0))
        else:
            acc, acc2 = sums, sums
        mine = tl.load(at + tl.arange(0, BM))
        store(acc, acc2, first, outputs, mine, bias_ptr, out_ptr, P, N, BIAS, GATE)


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
    bias: Tensor | None = None,
    gate: str | None = None,
    shape: ExpertCodesShape | None = None,
) -> Tensor:
    """``expert_linear`` over weights of 4 bits.

    Args:
        words, scale, zero, row_scale, group: of a quantization.tiled.TiledWeight; FP4 has a row_scale.
        rows: of all experts' weights; those of one are a multiple of 16, with a gate each half of them.
    """
    k = x.shape[1]
    each = rows // plan.num_experts
    n = each // (1 if gate is None else 2)
    blocks, fp4 = words.shape[1] // 2, row_scale is not None
    assert plan.pairs is not None and plan.experts is not None and x.stride(1) == 1 and words.is_contiguous()
    assert each % ROWS == 0 and (gate is None or n % ROWS == 0)
    most = plan.chosen.shape[0]  # an expert has no more rows than there are tokens
    shape = shape or codes_shape(min(plan.block, most), blocks, gate is not None)
    heights = triton.cdiv(min(plan.block, most), shape.bm)
    tiles = triton.cdiv(n, shape.tiles * ROWS // (1 if gate is None else 2))
    out = torch.empty(plan.num_pairs, n, dtype=x.dtype, device=x.device)
    _expert_codes[(tiles * plan.experts.numel(), heights)](
        x, x.stride(0), words, scale, scale if zero is None else zero, scale if row_scale is None else row_scale,
        1 if fp4 else scale.shape[1], x if bias is None else bias, out, plan.pairs, plan.experts, plan.num_pairs,
        x.shape[0], plan.num_experts, n, k, each // ROWS, blocks, tiles, SHARED=plan.num_pairs // x.shape[0],
        ROWS=plan.block, BM=shape.bm, T=shape.tiles, W=shape.warps, FP4=fp4, GROUP=group, ZERO=zero is not None,
        EVEN=k == blocks * COLUMNS and blocks % shape.warps == 0, BIAS=bias is not None, GATE=GATES[gate],
        PLAIN=INTERPRETED or x.dtype is not torch.bfloat16, **launch_options(x.device, shape.warps, 1),
    )  # fmt: skip
    return out
