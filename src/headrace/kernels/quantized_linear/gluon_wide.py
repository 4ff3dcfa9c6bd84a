"""Products of hundreds of rows over FP4 codes: decoded in the registers from which the tensor cores multiply.

A program has 16 T outputs and BM rows. While the tensor cores multiply 64 columns, its warps decode the next 64:
weights come straight into registers (tiling.py lays them as operands), x through the copy engine into shared memory.
A lane's weights are 16 columns of one group, which the tensor cores take for other 16, so x is arranged before: column
64 c + 16 t + 4 i + 2 a + b of x stands at 64 c + 16 i + 8 a + 2 t + b.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.kernels.launch import launch_options
from headrace.kernels.linear.gluon_parts import gather_parts, grid_dependency
from headrace.kernels.linear.triton_parts import SCRATCH
from headrace.kernels.quantized_linear.triton_fragments import E2M1_QUARTERS
from headrace.kernels.quantized_linear.tuning import WideShape

__all__ = [
    "arrange",
    "arranged",
    "outputs_layout",
    "rows_descriptor",
    "wide_product",
    "wide_sums",
]

_CHUNK = 64


@triton.jit
def arranged(at):
    """Which column of x stands at ``at``."""
    r = at % 64
    return at - r + r // 2 % 4 * 16 + r // 16 * 4 + r // 8 % 2 * 2 + r % 2


@triton.jit
def _arrange(x_ptr, x_row, out_ptr, K, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One row, BLOCK columns."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_row + arranged(at), mask=at < K, other=0.0)
    tl.store(out_ptr + row * K + at, x, mask=at < K)


@gluon.jit
def _pair(word):
    """int32 -> its two bfloat16, in a new last dimension."""
    low = word.to(gl.int16).to(gl.bfloat16, bitcast=True)
    return gl.join(low, (word >> 16).to(gl.int16).to(gl.bfloat16, bitcast=True))


@gluon.jit
def _scales(words, CHUNK: gl.constexpr, H: gl.constexpr, GROUP: gl.constexpr, LANES: gl.constexpr):
    """As triton_fragments' _fp4_scales, of one chunk: int32 [T, 128]."""
    e = (words >> (16 * CHUNK + 8 * H)) & 255
    if GROUP == 16:
        twice = e * 0x00100010 + 0x70007000
    else:
        twice = e * 0x00800080 + 0x3F003F00
    four = gl.join(gl.join(twice, twice), gl.join(twice, twice))
    return gl.convert_layout(four.reshape([words.shape[0], 128]), LANES)


@gluon.jit
def _decode(words, scales, CHUNK: gl.constexpr, GROUP: gl.constexpr, LANES: gl.constexpr,
            OPERAND: gl.constexpr):  # fmt: skip
    """int32 [T, 128] of a chunk and [T, 32] of its block -> bfloat16 [16 T, 64]; of 16 columns a scale times 2**-16."""
    T: gl.constexpr = words.shape[0]
    s0 = _scales(scales, CHUNK, 0, GROUP, LANES)
    s1 = _scales(scales, CHUNK, 1, GROUP, LANES)
    p00, p01, p10, p11 = gl.inline_asm_elementwise(
        E2M1_QUARTERS, "=&r,=&r,=&r,=&r,r,r,r", [words, s0, s1], dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True, pack=1,
    )  # fmt: skip
    w = gl.join(gl.join(_pair(p00), _pair(p10)), gl.join(_pair(p01), _pair(p11)))  # T lane b a h
    w = w.reshape([T, 8, 4, 4, 2, 2, 2])  # T g t i b a h
    w = gl.permute(w, (0, 6, 1, 3, 5, 2, 4)).reshape([16 * T, 64])
    return gl.convert_layout(w, OPERAND)


@gluon.jit
def _ask(x_desc, bars, x_smem, chunk, row, first, BYTES: gl.constexpr, STAGES: gl.constexpr):
    """Load a chunk of x, the first of which begins at column ``first``."""
    slot = chunk % STAGES
    mbarrier.expect(bars.index(slot), BYTES)
    tma.async_copy_global_to_shared(x_desc, [row, first + chunk * 64], bars.index(slot), x_smem.index(slot))


@gluon.jit
def _multiply(
    a, before, acc, x_desc, bars, x_smem, chunk, count, row, first, BYTES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Begin acc + a times a chunk of x, and wait for the one with ``before``; what it lay in is filled anew."""
    mbarrier.wait(bars.index(chunk % STAGES), (chunk // STAGES) & 1)
    begun = warpgroup_mma(a, x_smem.index(chunk % STAGES).permute((1, 0)), acc, is_async=True)
    acc, before = warpgroup_mma_wait(1, deps=(begun, before))
    gl.thread_barrier()  # all warps have waited
    if (chunk > 0) & (chunk - 1 + STAGES < count):
        _ask(x_desc, bars, x_smem, chunk - 1 + STAGES, row, first, BYTES, STAGES)
    return acc


@gluon.jit
def wide_sums(
    x_desc, row, w_ptr, scale_ptr, tiles, blocks, lo, own, T: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, WAIT: gl.constexpr,
):  # fmt: skip
    """Sums of T tiles of weights and BM rows of arranged x from ``row`` on, over ``own`` blocks from ``lo`` on.

    Args:
        tiles: int64 [T], which tiles of 16 rows of the weights.
        WAIT: for the kernel before, when weights are on their way.

    Returns:
        float32 [16 T, BM].
    """
    WARPS: gl.constexpr = gl.num_warps()
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    LANES: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    SINGLE: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])
    BYTES: gl.constexpr = BM * 128
    SHARING: gl.constexpr = GROUP // 16
    x_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, 64], x_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
    gl.thread_barrier()
    near = gl.convert_layout(tiles, gl.SliceLayout(1, LANES)) * blocks + lo
    w_at = w_ptr + (near * 256)[:, None] + gl.arange(0, 128, gl.SliceLayout(0, LANES))[None, :]
    near = gl.convert_layout(tiles, gl.SliceLayout(1, SINGLE)) * blocks + lo
    lane = gl.arange(0, 32, gl.SliceLayout(0, SINGLE))
    s_at = scale_ptr + (near * (32 // SHARING))[:, None] + (lane // SHARING)[None, :]
    w0, w1, s = gl.load(w_at), gl.load(w_at + 128), gl.load(s_at)
    if WAIT:
        grid_dependency("griddepcontrol.wait; mov.b32 $0, 0;")
    first, count = lo * 128, own * 2
    for i in gl.static_range(STAGES):
        if i < count:
            _ask(x_desc, bars, x_smem, i, row, first, BYTES, STAGES)
    acc = gl.zeros([16 * T, BM], gl.float32, MMA)
    a = _decode(w0, s, 0, GROUP, LANES, OPERAND)
    before = a
    for k in range(own):
        near_k = gl.minimum(k + 1, own - 1)
        next0, next1 = gl.load(w_at + near_k * 256), gl.load(w_at + near_k * 256 + 128)
        next_s = gl.load(s_at + near_k * (32 // SHARING))
        acc = _multiply(a, before, acc, x_desc, bars, x_smem, 2 * k, count, row, first, BYTES, STAGES)
        before = _decode(w1, s, 1, GROUP, LANES, OPERAND)
        acc = _multiply(before, a, acc, x_desc, bars, x_smem, 2 * k + 1, count, row, first, BYTES, STAGES)
        w1, s = next1, next_s
        a = _decode(next0, s, 0, GROUP, LANES, OPERAND)
    acc, a, before = warpgroup_mma_wait(0, deps=(acc, a, before))
    gl.thread_barrier()  # x's places are used for other things from here on, when all warps have read them
    return acc


@gluon.jit(do_not_specialize=["M", "heights"])
def _wide(
    x_desc, w_ptr, scale_ptr, row_scale_ptr, bias_ptr, res_ptr, out_ptr, parts_ptr, arrivals_ptr, M, N, R, blocks,
    heights, T: gl.constexpr, BM: gl.constexpr, SPLITS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    BIAS: gl.constexpr, RESIDUAL: gl.constexpr, OUT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """out[m, n] for BM rows and 16 T outputs, over one of SPLITS ranges of K.

    ``blocks`` of 128 columns, R tiles of 16 outputs in all.
    """
    if PDL:
        grid_dependency("griddepcontrol.launch_dependents; mov.b32 $0, 0;")
    part, row = gl.program_id(0) // heights, gl.program_id(0) % heights * BM
    tile, split = part // SPLITS, part % SPLITS
    span = (blocks + SPLITS - 1) // SPLITS
    own = gl.minimum(split * span + span, blocks) - split * span  # none, where there are too many splits
    tiles = gl.minimum(tile * T + gl.arange(0, T, gl.SliceLayout(1, OUT)), R - 1).to(gl.int64)
    lo = gl.minimum(split * span, blocks - 1)
    acc = wide_sums(x_desc, row, w_ptr, scale_ptr, tiles, blocks, lo, own, T, BM, STAGES, GROUP, PDL)
    y, last = gl.convert_layout(acc, OUT), True
    if SPLITS > 1:
        slot = tile * heights + gl.program_id(0) % heights
        y, _, last = gather_parts(y, y, parts_ptr, arrivals_ptr, slot, split, BM, 16 * T, SPLITS, 0, OUT)
    if last:
        n = tile * (16 * T) + gl.arange(0, 16 * T, gl.SliceLayout(1, OUT))
        m = row + gl.arange(0, BM, gl.SliceLayout(0, OUT))
        UP: gl.constexpr = 65536.0 if GROUP == 16 else 1.0
        y = y * (gl.load(row_scale_ptr + n, mask=n < N, other=0.0) * UP)[:, None]
        if BIAS:
            y += gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
        at = m[None, :].to(gl.int64) * N + n[:, None]
        ok = (n < N)[:, None] & (m < M)[None, :]
        if RESIDUAL:
            y += gl.load(res_ptr + at, mask=ok, other=0.0).to(gl.float32)
        gl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=ok)


def arrange(x: Tensor) -> Tensor:
    """The columns of x [M, K] in the order in which ``wide_product`` reads them."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, k = x.shape
    _arrange[(rows, triton.cdiv(k, 2048))](
        x, x.stride(0), out, k, BLOCK=2048, **launch_options(x.device, 4, 1)
    )
    return out


def wide_product(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    row_scale: Tensor,
    *,
    rows: int,
    group: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    shape: WideShape,
) -> Tensor:
    """``x @ weight.T + bias + residual`` with float32 sums, rounded once.

    Args:
        x: bfloat16 [M, K], K a multiple of 64.
        words, scale, row_scale, group: of a quantization.tiled.TiledWeight in FP4 that ``tuning.covers_wide``.
        rows: of the weight.
    """
    num_rows, blocks = x.shape[0], words.shape[1] // 2
    ordered = arrange(x)
    out = torch.empty(num_rows, rows, dtype=x.dtype, device=x.device)
    heights, across = triton.cdiv(num_rows, shape.bm), triton.cdiv(rows, 16 * shape.tiles)
    parts = arrivals = out
    if shape.splits > 1:
        slots, size = across * heights, shape.splits * 16 * shape.tiles * shape.bm
        parts = torch.empty(
            slots * size, dtype=torch.float32, device=x.device
        )  # of a step's memory, as all its tensors
        arrivals = SCRATCH.get(x.device, 1, slots)[1]
    _wide[(across * shape.splits * heights,)](
        rows_descriptor(ordered, shape.bm), words, scale, row_scale, x if bias is None else bias,
        x if residual is None else residual, out, parts, arrivals, num_rows, rows, words.shape[0], blocks, heights,
        T=shape.tiles, BM=shape.bm, SPLITS=shape.splits, STAGES=shape.stages, GROUP=group, BIAS=bias is not None,
        RESIDUAL=residual is not None, OUT=outputs_layout(16 * shape.tiles, shape.warps), PDL=True,
        num_warps=shape.warps, launch_pdl=True,
    )  # fmt: skip
    return out


def rows_descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Of a contiguous matrix that is read in tiles of ``rows`` rows and 64 columns."""
    block = [rows, _CHUNK]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    return TensorDescriptor(x, list(x.shape), [x.shape[1], 1], block, layout)


@functools.cache
def outputs_layout(high: int, warps: int) -> gl.BlockedLayout:
    """Of sums [high, rows] whose first dimension lies together in memory."""
    return gl.BlockedLayout([8, 1], [high // 8, 256 // high], [1, warps], [0, 1])
