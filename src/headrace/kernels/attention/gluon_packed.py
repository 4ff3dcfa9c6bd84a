"""Attention of one pass on Hopper, specialized by warps as gluon_fresh, for packed texts of some length, in Gluon.

A program takes tiles of 128 query rows one after another (persistent): the copying warp fetches the next tile's
queries, keys and values while the last one is finished and written. 16,384 tokens on an H200: texts of 512, 16 heads of
64, 94 us (triton_packed 114, cuDNN 94); causal, 16 heads of 128 over 8, 106 (130); texts of 256, 58 (72) and 81 (94).
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from headrace.kernels.attention.gluon_fresh import _soften, _zero_behind
from headrace.kernels.launch import num_multiprocessors

__all__ = ["ROWS", "packed_specialized"]

ROWS = 128  # query rows of a tile, two groups of 64
_TILE, _STAGES = 128, 2  # keys of a tile, tiles of keys and of values in flight


@gluon.jit
def _turn(map_ptr, turn, turns, num_heads, ROWS: gl.constexpr, TILE: gl.constexpr, CAUSAL: gl.constexpr):
    """(head, first row of the text, its length, the tile in it, key tiles); length 0: no work."""
    head = turn % num_heads
    at = map_ptr + (turns // num_heads - 1 - turn // num_heads) * 4
    start = gl.load(at)
    length = gl.load(at + 1)
    tile = gl.load(at + 2)
    last = length - 1
    if CAUSAL:
        last = gl.minimum(tile * ROWS + ROWS - 1, last)
    return head, start, length, tile, last // TILE + 1


@gluon.jit
def _fetch(q_desc, k_desc, v_desc, q_rows, k_ring, v_ring, q_full, k_full, v_full, q_free, k_free, v_free, map_ptr,
           turns, num_heads, G: gl.constexpr, D: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
           CAUSAL: gl.constexpr):  # fmt: skip
    """The copying warp: queries of a tile, then keys and values from the last to the first."""
    taken = 0
    done = 0
    for turn in range(gl.program_id(0), turns, gl.num_programs(0)):
        head, start, length, tile, count = _turn(map_ptr, turn, turns, num_heads, 128, TILE, CAUSAL)
        if length > 0:
            slot = taken % 2
            mbarrier.wait(q_free.index(slot), ((taken // 2) & 1) ^ 1)
            mbarrier.expect(q_full.index(slot), 2 * q_desc.block_type.nbytes)
            row = start + tile * 128
            tma.async_copy_global_to_shared(
                q_desc, [row, head * D], q_full.index(slot), q_rows.index(2 * slot)
            )
            tma.async_copy_global_to_shared(
                q_desc, [row + 64, head * D], q_full.index(slot), q_rows.index(2 * slot + 1)
            )
            column = head // G * D
            for i in range(count):
                stage = (done + i) % STAGES
                phase = ((done + i) // STAGES) & 1
                row = start + (count - 1 - i) * TILE
                mbarrier.wait(k_free.index(stage), phase ^ 1)
                mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    k_desc, [row, column], k_full.index(stage), k_ring.index(stage)
                )
                mbarrier.wait(v_free.index(stage), phase ^ 1)
                mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    v_desc, [row, column], v_full.index(stage), v_ring.index(stage)
                )
            taken += 1
            done += count


@gluon.jit
def _step(acc, p, peak, norm, none, q, k_ring, v_ring, k_full, v_full, k_free, v_free, i, end, last, length, factor,
          dtype: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr, S_LAYOUT: gl.constexpr,
          O_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr):  # fmt: skip
    """As gluon_fresh, but weights go round as float32: pairs of 16 bits would be taken apart and put together again."""
    stage = i % STAGES
    before = (i - 1) % STAGES
    mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
    score = warpgroup_mma(q, k_ring.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
    narrow = gl.convert_layout(p, P_LAYOUT).to(dtype)
    acc = warpgroup_mma(narrow, v_ring.index(before), acc, is_async=True)
    score = warpgroup_mma_wait(1, [score])
    mbarrier.arrive(k_free.index(stage), count=1)
    weights, peak, norm, alpha = _soften(
        score, peak, norm, (end - 1 - i) * TILE, last, length, factor, TILE, MASKED, S_LAYOUT
    )
    # This has come long ago. But no instruction is moved over it: exponentials stay before the wait for the product.
    mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
    acc, narrow, weights = warpgroup_mma_wait(0, [acc, narrow, weights])
    mbarrier.arrive(v_free.index(before), count=1)
    return acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None], weights, peak, norm


@gluon.jit
def _attend(out_ptr, q_rows, k_ring, v_ring, q_full, k_full, v_full, q_free, k_free, v_free, map_ptr, turns, num_heads,
            factor, out_factor, GROUP: gl.constexpr, D: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
            CAUSAL: gl.constexpr, FACTOR: gl.constexpr):  # fmt: skip
    """A group of four warps: 64 rows of each tile."""
    dtype: gl.constexpr = k_ring.dtype
    WIDTH: gl.constexpr = 16 if FACTOR else 8
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    OUT: gl.constexpr = gl.BlockedLayout([1, WIDTH], [32 * WIDTH // D, D // WIDTH], [4, 1], [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    none = gl.full([64, TILE], 0.0, gl.float32, S_LAYOUT)
    taken = 0
    done = 0
    for turn in range(gl.program_id(0), turns, gl.num_programs(0)):
        head, start, length, tile, count = _turn(map_ptr, turn, turns, num_heads, 128, TILE, CAUSAL)
        if length > 0:
            first = tile * 128 + GROUP * 64
            last = gl.full([64], 0, gl.int32, ROW) + length
            unmasked = length // TILE  # tiles that every row sees whole
            if CAUSAL:
                last = first + gl.arange(0, 64, ROW)
                unmasked = (tile * 128 + 1) // TILE
            slot = taken % 2
            mine = q_rows.index(2 * slot + GROUP)
            peak = gl.full([64], float("-inf"), gl.float32, ROW)
            norm = gl.full([64], 0.0, gl.float32, ROW)
            acc = gl.full([64, D], 0.0, gl.float32, O_LAYOUT)

            # The last tile of keys, alone: the diagonal or the text's end may run through it.
            stage = done % STAGES
            phase = (done // STAGES) & 1
            mbarrier.wait(q_full.index(slot), (taken // 2) & 1)
            mbarrier.wait(k_full.index(stage), phase)
            score = warpgroup_mma(
                mine, k_ring.index(stage).permute((1, 0)), none, use_acc=False, is_async=True
            )
            score = warpgroup_mma_wait(0, [score])
            mbarrier.arrive(k_free.index(stage), count=1)
            key = (count - 1) * TILE
            if CAUSAL or length < count * TILE:
                p, peak, norm, _ = _soften(score, peak, norm, key, last, length, factor, TILE, True, S_LAYOUT)
            else:
                p, peak, norm, _ = _soften(
                    score, peak, norm, key, last, length, factor, TILE, False, S_LAYOUT
                )
            if length < count * TILE:
                mbarrier.wait(v_full.index(stage), phase)
                _zero_behind(v_ring.index(stage), length - key, TILE, D)
            first_whole = done + gl.maximum(count - unmasked, 1)
            for i in range(done + 1, first_whole):
                acc, p, peak, norm = _step(acc, p, peak, norm, none, mine, k_ring, v_ring, k_full, v_full, k_free,
                                           v_free, i, done + count, last, length, factor, dtype, TILE, STAGES, True,
                                           S_LAYOUT, O_LAYOUT, P_LAYOUT)  # fmt: skip
            for i in range(first_whole, done + count):
                acc, p, peak, norm = _step(acc, p, peak, norm, none, mine, k_ring, v_ring, k_full, v_full, k_free,
                                           v_free, i, done + count, last, length, factor, dtype, TILE, STAGES, False,
                                           S_LAYOUT, O_LAYOUT, P_LAYOUT)  # fmt: skip
            taken += 1
            done += count
            mbarrier.arrive(q_free.index(slot), count=1)
            stage = (done - 1) % STAGES
            mbarrier.wait(v_full.index(stage), ((done - 1) // STAGES) & 1)
            narrow = gl.convert_layout(p, P_LAYOUT).to(dtype)
            acc = warpgroup_mma(narrow, v_ring.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(0, [acc])
            mbarrier.arrive(v_free.index(stage), count=1)

            inverse = 1.0 / gl.where(norm > 0.0, norm, 1.0)
            if FACTOR:
                inverse = inverse * out_factor
            acc = acc * gl.convert_layout(inverse, gl.SliceLayout(1, O_LAYOUT))[:, None]
            if FACTOR:
                acc += acc * 0.0  # infinity becomes NaN: the cast to FP8 would make it 448
                result = gl.convert_layout(acc.to(gl.float16), OUT).to(out_ptr.dtype.element_ty)
            else:
                result = gl.convert_layout(acc.to(dtype), OUT)
            row = first + gl.arange(0, 64, gl.SliceLayout(1, OUT))
            d = gl.arange(0, D, gl.SliceLayout(0, OUT))
            at = (start + row).to(gl.int64) * num_heads + head
            gl.store(out_ptr + at[:, None] * D + d[None, :], result, mask=(row < length)[:, None])


@gluon.jit(do_not_specialize=["turns"])
def _packed_specialized(
    q_desc, k_desc, v_desc, out_ptr, map_ptr, turns, num_heads, scale, out_factor, G: gl.constexpr, D: gl.constexpr,
    TILE: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, FACTOR: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    factor = scale * 1.4426950408889634
    q_rows = gl.allocate_shared_memory(dtype, [4, 64, D], q_desc.layout)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    gl.warp_specialize(
        [
            (_attend, (out_ptr, q_rows, k_ring, v_ring, q_full, k_full, v_full, q_free, k_free, v_free, map_ptr, turns,
                       num_heads, factor, out_factor, 0, D, TILE, STAGES, CAUSAL, FACTOR)),
            (_attend, (out_ptr, q_rows, k_ring, v_ring, q_full, k_full, v_full, q_free, k_free, v_free, map_ptr, turns,
                       num_heads, factor, out_factor, 1, D, TILE, STAGES, CAUSAL, FACTOR)),
            (_fetch, (q_desc, k_desc, v_desc, q_rows, k_ring, v_ring, q_full, k_full, v_full, q_free, k_free, v_free,
                      map_ptr, turns, num_heads, G, D, TILE, STAGES, CAUSAL)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def packed_specialized(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tensor,
    *,
    scale: float,
    causal: bool,
    factor: float | None = None,
) -> Tensor:
    """As packed_attention, without window, soft cap and bias.

    Args:
        q: [T, Hq, D]; k, v: [T, Hkv, D], float16 or bfloat16, D 64 or 128, heads side by side.
        tiles: the map of tiles of ROWS query rows of one head.
        factor: the result is multiplied with it, and rounded to FP8.

    Returns:
        [T, Hq, D], contiguous.
    """
    num_tokens, num_heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype if factor is None else torch.float8_e4m3fn, device=q.device)
    kind = gl.bfloat16 if q.dtype is torch.bfloat16 else gl.float16

    def described(x: Tensor, rows: int) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout.get_default_for([rows, dim], kind)
        return TensorDescriptor(x, [num_tokens, x.shape[1] * dim], [x.stride(0), 1], [rows, dim], layout)

    turns = tiles.shape[0] * num_heads
    _packed_specialized[(min(turns, num_multiprocessors(q.device)),)](
        described(q, 64), described(k, _TILE), described(v, _TILE), out, tiles, turns, num_heads, scale,
        factor or 0.0, G=num_heads // k.shape[1], D=dim, TILE=_TILE, STAGES=_STAGES, CAUSAL=causal,
        FACTOR=factor is not None, num_warps=4, maxnreg=168,
    )  # fmt: skip
    return out
