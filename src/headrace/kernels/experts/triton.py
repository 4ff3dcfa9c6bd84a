"""Products with the weights of chosen experts on GPUs: each block of rows reads its own expert's, and no other's.

As in kernels/linear the weights are on the wide side of the product. K is never cut, and each step along it is one
instruction of the tensor cores: a row's result depends neither on its company nor on the shape of the tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.kernels.experts.plan import ExpertPlan
from headrace.kernels.experts.triton_parts import GATES, block_of, rows_of, store
from headrace.kernels.experts.triton_plan import plan_experts, route
from headrace.kernels.experts.tuning import ProductShape, product_shape
from headrace.kernels.launch import INTERPRETED, launch_options

__all__ = ["combine", "expert_linear", "plan_experts", "route"]


@triton.jit(do_not_specialize=["P"])
def _expert_linear(x_ptr, x_row, w_ptr, bias_ptr, out_ptr, pairs_ptr, contents_ptr, P, N, K, tiles,
                   SHARED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BIAS: tl.constexpr,
                   GATE: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """out[pair, n] for the BM pairs of a block and BN outputs of its expert; with a gate rows n and N + n together."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tile, block = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    expert, count = block_of(contents_ptr, block)
    if count > 0:
        pair, rows = rows_of(pairs_ptr, block, count, P, BM, SHARED)
        n = tile * BN + tl.arange(0, BN)
        HALVES: tl.constexpr = 2 if GATE > 0 else 1
        first = expert.to(tl.int64) * (N * HALVES)
        cols = tl.arange(0, BK)
        # Outputs past the end repeat the last one, and rows without a pair the first: no mask on the loads.
        w_at = w_ptr + (first + tl.minimum(n, N - 1))[:, None] * K + cols[None, :]
        x_at = x_ptr + rows.to(tl.int64)[None, :] * x_row + cols[:, None]
        acc = tl.zeros([BN, BM], tl.float32)
        acc2 = tl.zeros([BN, BM], tl.float32)
        above = N.to(tl.int64) * K
        for k in range(0, K, BK):
            if EVEN:
                w = tl.load(w_at + k)
                x = tl.load(x_at + k)
            else:
                w = tl.load(w_at + k, mask=(k + cols < K)[None, :], other=0.0)
                x = tl.load(x_at + k, mask=(k + cols < K)[:, None], other=0.0)
            acc = tl.dot(w, x, acc, out_dtype=tl.float32, input_precision="ieee")
            if GATE > 0:
                if EVEN:
                    w2 = tl.load(w_at + above + k)
                else:
                    w2 = tl.load(w_at + above + k, mask=(k + cols < K)[None, :], other=0.0)
                acc2 = tl.dot(w2, x, acc2, out_dtype=tl.float32, input_precision="ieee")
        store(acc, acc2, first, n, pair, bias_ptr, out_ptr, P, N, BIAS, GATE)


@triton.jit
def _combine(parts_ptr, weights_ptr, res_ptr, out_ptr, D, TOP: tl.constexpr, RESIDUAL: tl.constexpr,
             BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = d < D
    acc = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(TOP):
        part = tl.load(parts_ptr + (t * TOP + i) * D + d, mask=ok, other=0.0).to(tl.float32)
        acc += part * tl.load(weights_ptr + t * TOP + i)
    if RESIDUAL:
        acc += tl.load(res_ptr + t * D + d, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + t * D + d, acc.to(out_ptr.dtype.element_ty), mask=ok)


def expert_linear(
    x: Tensor,
    weight: Tensor,
    plan: ExpertPlan,
    *,
    bias: Tensor | None = None,
    gate: str | None = None,
    shape: ProductShape | None = None,
) -> Tensor:
    """See the package."""
    assert (
        x.stride(1) == 1 and weight.is_contiguous() and plan.pairs is not None and plan.contents is not None
    )
    k = weight.shape[1]
    n = weight.shape[0] // plan.num_experts // (1 if gate is None else 2)
    out = torch.empty(plan.num_pairs, n, dtype=x.dtype, device=x.device)
    shape = shape or product_shape(
        x.device, plan.block, plan.contents.numel(), gate is not None, 4 if INTERPRETED else weight.itemsize
    )
    tiles = triton.cdiv(n, shape.bn)
    _expert_linear[(tiles * plan.contents.numel(),)](
        x, x.stride(0), weight, x if bias is None else bias, out, plan.pairs, plan.contents, plan.num_pairs,
        n, k, tiles, SHARED=plan.num_pairs // x.shape[0], BM=plan.block, BN=shape.bn, BK=shape.bk,
        BIAS=bias is not None, GATE=GATES[gate], EVEN=k % shape.bk == 0,
        **launch_options(x.device, shape.warps, shape.stages),
    )  # fmt: skip
    return out


def combine(parts: Tensor, weights: Tensor, residual: Tensor | None = None) -> Tensor:
    """See the package."""
    (num_tokens, top), width = weights.shape, parts.shape[1]
    assert parts.is_contiguous() and (residual is None or residual.is_contiguous())
    out = torch.empty(num_tokens, width, dtype=parts.dtype, device=parts.device)
    block = min(1024, triton.next_power_of_2(width))
    _combine[(num_tokens, triton.cdiv(width, block))](
        parts, weights, parts if residual is None else residual, out, width, TOP=top, RESIDUAL=residual is not None,
        BLOCK=block, **launch_options(parts.device, 4, 1),
    )  # fmt: skip
    return out
