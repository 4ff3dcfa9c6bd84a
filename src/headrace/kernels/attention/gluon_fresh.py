"""Whole prompts on Hopper, specialized by warps (FlashAttention-3, Shah et al. 2024), in Gluon.

One warp has the copy engine fetch keys and values into rings of shared memory; two groups of four warps, 64 query rows
each, share them. A group's scores of the next keys are computed while it takes exponentials, and as nothing but the
rings ties the groups to each other, one multiplies while the other exponentiates.
The arithmetic and the arguments are those of triton_fresh.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from headrace.kernels.attention.triton_tile_map import tile_map

__all__ = ["specialized_attention"]

_ROWS = 128  # of a program
_TILE, _STAGES = 128, 2  # keys of a tile, tiles of keys and of values in flight


@gluon.jit
def _fetch(k_desc, v_desc, k_ring, v_ring, k_full, v_full, k_free, v_free, start, column, count, TILE: gl.constexpr,
           STAGES: gl.constexpr):  # fmt: skip
    """The copying warp: tiles of keys and of values from the last to the first."""
    for i in range(count):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        row = start + (count - 1 - i) * TILE
        mbarrier.wait(k_free.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [row, column], k_full.index(stage), k_ring.index(stage))
        mbarrier.wait(v_free.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(v_desc, [row, column], v_full.index(stage), v_ring.index(stage))


@gluon.jit
def _soften(score, peak, norm, key, last, length, factor, TILE: gl.constexpr, MASKED: gl.constexpr,
            S_LAYOUT: gl.constexpr):  # fmt: skip
    """(weights, new peak, new norm, what older sums are multiplied by)."""
    if MASKED:
        at = key + gl.arange(0, TILE, gl.SliceLayout(0, S_LAYOUT))
        seen = (at[None, :] <= last[:, None]) & (at < length)[None, :]
        score = gl.where(seen, score, float("-inf"))
    top = gl.maximum(peak, gl.max(score, 1) * factor)
    safe = top
    if MASKED:
        safe = gl.where(top == float("-inf"), 0.0, top)
    p = gl.exp2(score * factor - safe[:, None])
    alpha = gl.exp2(peak - safe)
    return p, top, norm * alpha + gl.sum(p, 1), alpha


@gluon.jit
def _zero_behind(buffer, left, TILE: gl.constexpr, D: gl.constexpr):
    """Values from row ``left`` on are a neighbour's: zero times their infinity must not count.

    Both groups write the same numbers.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    v = buffer.load(layout)
    row = gl.arange(0, TILE, gl.SliceLayout(1, layout))
    buffer.store(gl.where((row < left)[:, None], v, 0.0))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _attend(q_ptr, q_row, q_head, out_ptr, q_rows, k_ring, v_ring, k_full, v_full, k_free, v_free, start, length, tile,
            head, num_heads, count, full, factor, GROUP: gl.constexpr, G: gl.constexpr, D: gl.constexpr,
            TILE: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """A group of four warps: 64 rows."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    IN: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    first = tile * 128 + GROUP * 64

    row = first + gl.arange(0, 64, gl.SliceLayout(1, IN))
    d = gl.arange(0, D, gl.SliceLayout(0, IN))
    at = (start + row // G).to(gl.int64) * q_row + (head * G + row % G) * q_head
    q = gl.load(q_ptr + at[:, None] + d[None, :], mask=(row < length * G)[:, None], other=0.0)
    mine = q_rows.index(GROUP)
    mine.store(q)
    fence_async_shared()
    gl.thread_barrier()

    last = (first + gl.arange(0, 64, ROW)) // G
    peak = gl.full([64], float("-inf"), gl.float32, ROW)
    norm = gl.full([64], 0.0, gl.float32, ROW)
    acc = gl.full([64, D], 0.0, gl.float32, O_LAYOUT)
    none = gl.full([64, TILE], 0.0, gl.float32, S_LAYOUT)

    # The last tile, alone: the diagonal runs through it.
    mbarrier.wait(k_full.index(0), 0)
    score = warpgroup_mma(mine, k_ring.index(0).permute((1, 0)), none, use_acc=False, is_async=True)
    score = warpgroup_mma_wait(0, [score])
    mbarrier.arrive(k_free.index(0), count=1)
    key = (count - 1) * TILE
    p, peak, norm, _ = _soften(score, peak, norm, key, last, length, factor, TILE, True, S_LAYOUT)
    p = gl.convert_layout(p, P_LAYOUT).to(dtype)
    if length < count * TILE:
        mbarrier.wait(v_full.index(0), 0)
        _zero_behind(v_ring.index(0), length - key, TILE, D)

    masked = count - full  # tiles with masks
    for i in range(1, masked):
        acc, p, peak, norm = _step(acc, p, peak, norm, none, mine, k_ring, v_ring, k_full, v_full, k_free, v_free, i,
                                   count, last, length, factor, TILE, STAGES, True, S_LAYOUT, O_LAYOUT, P_LAYOUT,
                                   dtype)  # fmt: skip
    for i in range(gl.maximum(masked, 1), count):
        acc, p, peak, norm = _step(acc, p, peak, norm, none, mine, k_ring, v_ring, k_full, v_full, k_free, v_free, i,
                                   count, last, length, factor, TILE, STAGES, False, S_LAYOUT, O_LAYOUT, P_LAYOUT,
                                   dtype)  # fmt: skip
    stage = (count - 1) % STAGES
    mbarrier.wait(v_full.index(stage), ((count - 1) // STAGES) & 1)
    acc = warpgroup_mma(p, v_ring.index(stage), acc, is_async=True)
    acc = warpgroup_mma_wait(0, [acc])

    inverse = 1.0 / gl.where(norm > 0.0, norm, 1.0)
    acc = acc * gl.convert_layout(inverse, gl.SliceLayout(1, O_LAYOUT))[:, None]
    row = first + gl.arange(0, 64, gl.SliceLayout(1, O_LAYOUT))
    d = gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))
    at = (start + row // G).to(gl.int64) * num_heads + head * G + row % G
    gl.store(out_ptr + at[:, None] * D + d[None, :], acc.to(dtype), mask=(row < length * G)[:, None])


@gluon.jit
def _step(acc, p, peak, norm, none, q, k_ring, v_ring, k_full, v_full, k_free, v_free, i, count, last, length, factor,
          TILE: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr, S_LAYOUT: gl.constexpr,
          O_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr, dtype: gl.constexpr):  # fmt: skip
    """Scores of tile i, then the values of the one before, during whose product the exponentials are taken."""
    stage = i % STAGES
    before = (i - 1) % STAGES
    mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
    score = warpgroup_mma(q, k_ring.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
    acc = warpgroup_mma(p, v_ring.index(before), acc, is_async=True)
    score = warpgroup_mma_wait(1, [score])
    mbarrier.arrive(k_free.index(stage), count=1)
    key = (count - 1 - i) * TILE
    weights, peak, norm, alpha = _soften(score, peak, norm, key, last, length, factor, TILE, MASKED, S_LAYOUT)
    # This has come long ago. But no instruction is moved over it: exponentials stay before the wait for the product.
    mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
    acc, p, weights = warpgroup_mma_wait(0, [acc, p, weights])
    mbarrier.arrive(v_free.index(before), count=1)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]
    p = gl.convert_layout(weights, P_LAYOUT).to(dtype)
    return acc, p, peak, norm


@gluon.jit
def _specialized(
    q_ptr, q_row, q_head, k_desc, v_desc, out_ptr, map_ptr, num_heads, scale, G: gl.constexpr, D: gl.constexpr,
    TILE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    kv_heads = num_heads // G
    head = gl.program_id(0) % kv_heads
    turn = (gl.num_programs(0) - 1 - gl.program_id(0)) // kv_heads
    start, length, tile = (
        gl.load(map_ptr + turn * 4),
        gl.load(map_ptr + turn * 4 + 1),
        gl.load(map_ptr + turn * 4 + 2),
    )
    if length > 0:
        dtype: gl.constexpr = q_ptr.dtype.element_ty
        first_pos = tile * 128 // G
        last_pos = gl.minimum((tile * 128 + 127) // G, length - 1)
        count = last_pos // TILE + 1
        full = (first_pos + 1) // TILE
        factor = scale * 1.4426950408889634

        swizzled: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
        q_rows = gl.allocate_shared_memory(dtype, [2, 64, D], swizzled)
        k_ring = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], k_desc.layout)
        v_ring = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], v_desc.layout)
        k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(k_full.index(i), count=1)
            mbarrier.init(v_full.index(i), count=1)
            mbarrier.init(k_free.index(i), count=2)
            mbarrier.init(v_free.index(i), count=2)
        gl.warp_specialize(
            [
                (_attend, (q_ptr, q_row, q_head, out_ptr, q_rows, k_ring, v_ring, k_full, v_full, k_free, v_free, start,
                           length, tile, head, num_heads, count, full, factor, 0, G, D, TILE, STAGES)),
                (_attend, (q_ptr, q_row, q_head, out_ptr, q_rows, k_ring, v_ring, k_full, v_full, k_free, v_free, start,
                           length, tile, head, num_heads, count, full, factor, 1, G, D, TILE, STAGES)),
                (_fetch, (k_desc, v_desc, k_ring, v_ring, k_full, v_full, k_free, v_free, start, head * D, count, TILE,
                          STAGES)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip


def specialized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    skip_single: bool,
    plan: dict[object, Any] | None = None,
    out: Tensor,
) -> Tensor:
    """As fresh_attention, without window, soft cap and sinks."""
    num_tokens, num_heads, dim = q.shape
    kv_heads = k.shape[1]
    group = num_heads // kv_heads
    kind = gl.bfloat16 if q.dtype is torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([_TILE, dim], kind)
    described = [
        TensorDescriptor(x, [num_tokens, kv_heads * dim], [x.stride(0), 1], [_TILE, dim], layout)
        for x in (k, v)
    ]
    tiles = tile_map(
        plan, query_starts, seq_lens, num_tokens, group, _ROWS, skip_single=skip_single, fresh=True
    )
    _specialized[(tiles.shape[0] * kv_heads,)](
        q, q.stride(0), q.stride(1), *described, out, tiles, num_heads, scale,
        G=group, D=dim, TILE=_TILE, STAGES=_STAGES, num_warps=4, maxnreg=168,
    )  # fmt: skip
    return out
