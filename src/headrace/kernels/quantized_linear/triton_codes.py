"""Linear maps of few rows over 4-bit codes on GPUs: codes become bfloat16 in registers, two columns an instruction.

A step reads one tile of 4 Q columns: 16-bit number j of a row holds columns j, j + Q, j + 2 Q and j + 3 Q of the tile
(``tiling.py``), so two numbers in a register become two neighbouring columns of each quarter without interleaving, and
each quarter meets its own contiguous part of x. Scales of FP4 multiply the decoded weights, exactly (2 + 4 significant
bits); those of integers multiply sums of their columns, in float32.
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
from headrace.kernels.quantized_linear.triton_parts import finish, gather_parts
from headrace.kernels.quantized_linear.tuning import CodesShape, codes_shape, padded_rows

__all__ = ["dequantize_codes", "four_bit_product"]

MAX_ROWS = 64


@triton.jit
def _e2m1_quarters(w, s0, s1, s2, s3):
    """int16 -> four bfloat16 of E2M1 times scale times 2**-126, two columns a time; scales are bfloat16 twice in int32.

    Two neighbouring columns share a scale. A code's bits are those of a bfloat16 of the lowest exponents, subnormals
    included; tiling.py lays them so that a shift and a mask find them, the last quarter's with four more operations.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 a, b, z;
        mov.b32 z, 0x80008000;
        and.b32 a, $4, 0x81C081C0;
        fma.rn.bf16x2 $0, a, $5, z;
        shl.b32 a, $4, 3;
        and.b32 a, a, 0x81C081C0;
        fma.rn.bf16x2 $1, a, $7, z;
        shl.b32 a, $4, 6;
        and.b32 a, a, 0x81C081C0;
        fma.rn.bf16x2 $2, a, $9, z;
        shl.b32 a, $4, 1;
        and.b32 a, a, 0x80008000;
        shr.b32 b, $4, 4;
        lop3.b32 a, b, 0x00C000C0, a, 0xEA;
        shr.b32 b, $4, 5;
        lop3.b32 a, b, 0x01000100, a, 0xEA;
        fma.rn.bf16x2 $3, a, $11, z;
        }
        """,
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
        [w, s0, s1, s2, s3],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _integer_quarters(w, z0, z1, z2, z3):
    """int16 -> four bfloat16 of ``code - zero``, given ``-128 - zero``; two columns a time, exact."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 a, one;
        mov.b32 one, 0x3F803F80;
        lop3.b32 a, $4, 0x000F000F, 0x43004300, 0xEA;
        fma.rn.bf16x2 $0, a, one, $5;
        shr.b32 a, $4, 4;
        lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA;
        fma.rn.bf16x2 $1, a, one, $6;
        shr.b32 a, $4, 8;
        lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA;
        fma.rn.bf16x2 $2, a, one, $7;
        shr.b32 a, $4, 12;
        lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA;
        fma.rn.bf16x2 $3, a, one, $8;
        }
        """,
        "=&r,=&r,=&r,=&r,r,r,r,r,r",
        [w, z0, z1, z2, z3],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _scales(at, BN: tl.constexpr, Q: tl.constexpr, GROUP: tl.constexpr):
    """Bytes at ``at`` [BN, Q / GROUP] -> int32 [BN, Q], a bfloat16 twice: of 16 columns, times 2**110; of 32, 2**e."""
    e = tl.load(at).to(tl.int32)
    if GROUP == 16:
        pair = e * 0x00100010 + 0x70007000
    else:
        bits = tl.where(e == 0, 0x0040, tl.where(e == 255, 0x7FC0, e * 128))
        pair = bits * 0x00010001
    return tl.broadcast_to(pair[:, :, None], (BN, Q // GROUP, GROUP)).reshape(BN, Q)


@triton.jit
def _plain_fp4(w, scale, i: tl.constexpr, GROUP: tl.constexpr):
    """Quarter i of int32 words under scales of ``_scales``, float32."""
    if i < 3:
        bits = w << (3 * i)
    else:
        bits = ((w << 1) & 0x8000) | ((w >> 4) & 0x00C0) | ((w >> 5) & 0x0100)
    half = (bits & 0x8000) | ((bits & 0x01C0) << 3)
    value = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
    FACTOR: tl.constexpr = 2.0**-110 if GROUP == 16 else 1.0
    return value * ((scale << 16).to(tl.float32, bitcast=True) * FACTOR)


@triton.jit
def _fp4_quarters(w, at, kind: tl.constexpr, BN: tl.constexpr, Q: tl.constexpr, GROUP: tl.constexpr,
                  PLAIN: tl.constexpr):  # fmt: skip
    """int16 [BN, Q] -> four [BN, Q] of ``kind``; those with 16 columns a scale times 2**-16 unless PLAIN."""
    EACH: tl.constexpr = Q // GROUP
    s0 = _scales(at, BN, Q, GROUP)
    s1 = _scales(at + EACH, BN, Q, GROUP)
    s2 = _scales(at + 2 * EACH, BN, Q, GROUP)
    s3 = _scales(at + 3 * EACH, BN, Q, GROUP)
    if PLAIN:
        words = w.to(tl.int32)
        w0 = _plain_fp4(words, s0, 0, GROUP).to(kind)
        w1 = _plain_fp4(words, s1, 1, GROUP).to(kind)
        w2 = _plain_fp4(words, s2, 2, GROUP).to(kind)
        w3 = _plain_fp4(words, s3, 3, GROUP).to(kind)
    elif GROUP == 16:
        w0, w1, w2, w3 = _e2m1_quarters(w, s0, s1, s2, s3)
    else:
        up = tl.full([BN, Q], 0x7E807E80, tl.int32)  # 2**126 twice
        w0, w1, w2, w3 = _e2m1_quarters(w, up, up, up, up)
        w0 = w0 * s0.to(tl.int16).to(tl.bfloat16, bitcast=True)
        w1 = w1 * s1.to(tl.int16).to(tl.bfloat16, bitcast=True)
        w2 = w2 * s2.to(tl.int16).to(tl.bfloat16, bitcast=True)
        w3 = w3 * s3.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return w0, w1, w2, w3


@triton.jit
def _zero(zero_ptr, at, BN: tl.constexpr, Q: tl.constexpr, ZERO: tl.constexpr, PLAIN: tl.constexpr):
    """``-128 - zero`` [BN, Q]."""
    if ZERO:
        z = tl.load(zero_ptr + at)
    else:
        z = tl.full([BN], -136.0, tl.float32)
    z = z.to(tl.float32 if PLAIN else tl.bfloat16)
    return tl.broadcast_to(z[:, None], (BN, Q))


@triton.jit
def _plain_integer(codes, zero, kind: tl.constexpr):
    return ((codes & 15).to(tl.float32) + 128.0 + zero).to(kind)


@triton.jit
def _step(acc, x0, x1, x2, x3, w_ptr, scale_ptr, zero_ptr, rows, k, width, N, groups, BN: tl.constexpr,
          Q: tl.constexpr, FP4: tl.constexpr, GROUP: tl.constexpr, PER: tl.constexpr, ZERO: tl.constexpr,
          PLAIN: tl.constexpr):  # fmt: skip
    """acc [BN, BM] plus the product over the 4 Q columns from k on; PER quarters share an integer's scale."""
    kind = x0.dtype
    w = tl.load(w_ptr + rows.to(tl.int64)[:, None] * width + (k // 4 + tl.arange(0, Q))[None, :])
    if FP4:
        at = rows.to(tl.int64)[:, None] * groups + (k // GROUP + tl.arange(0, Q // GROUP))[None, :]
        w0, w1, w2, w3 = _fp4_quarters(w, scale_ptr + at, kind, BN, Q, GROUP, PLAIN)
        # Sums of their own: an accumulator that lives on to the next step would make ptxas wait after every product.
        part = tl.dot(w0, x0, out_dtype=tl.float32, input_precision="ieee")
        part = tl.dot(w1, x1, part, out_dtype=tl.float32, input_precision="ieee")
        part = tl.dot(w2, x2, part, out_dtype=tl.float32, input_precision="ieee")
        part = tl.dot(w3, x3, part, out_dtype=tl.float32, input_precision="ieee")
        acc += part
    else:
        at0 = tl.minimum(k // GROUP, groups - 1).to(tl.int64) * N + rows
        at1 = tl.minimum((k + Q) // GROUP, groups - 1).to(tl.int64) * N + rows
        at2 = tl.minimum((k + 2 * Q) // GROUP, groups - 1).to(tl.int64) * N + rows
        at3 = tl.minimum((k + 3 * Q) // GROUP, groups - 1).to(tl.int64) * N + rows
        z0 = _zero(zero_ptr, at0, BN, Q, ZERO, PLAIN)
        z1 = z0 if PER >= 2 else _zero(zero_ptr, at1, BN, Q, ZERO, PLAIN)
        z2 = z0 if PER == 4 else _zero(zero_ptr, at2, BN, Q, ZERO, PLAIN)
        z3 = z2 if PER >= 2 else _zero(zero_ptr, at3, BN, Q, ZERO, PLAIN)
        if PLAIN:
            codes = w.to(tl.int32)
            w0 = _plain_integer(codes, z0, kind)
            w1 = _plain_integer(codes >> 4, z1, kind)
            w2 = _plain_integer(codes >> 8, z2, kind)
            w3 = _plain_integer(codes >> 12, z3, kind)
        else:
            w0, w1, w2, w3 = _integer_quarters(w, z0, z1, z2, z3)
        # All products first, so that they run while the scales are on their way.
        p0 = tl.dot(w0, x0, out_dtype=tl.float32, input_precision="ieee")
        if PER == 1:
            p1 = tl.dot(w1, x1, out_dtype=tl.float32, input_precision="ieee")
            p2 = tl.dot(w2, x2, out_dtype=tl.float32, input_precision="ieee")
            p3 = tl.dot(w3, x3, out_dtype=tl.float32, input_precision="ieee")
            acc += p0 * tl.load(scale_ptr + at0)[:, None]
            acc += p1 * tl.load(scale_ptr + at1)[:, None]
            acc += p2 * tl.load(scale_ptr + at2)[:, None]
            acc += p3 * tl.load(scale_ptr + at3)[:, None]
        elif PER == 2:
            p2 = tl.dot(w2, x2, out_dtype=tl.float32, input_precision="ieee")
            p0 = tl.dot(w1, x1, p0, out_dtype=tl.float32, input_precision="ieee")
            p2 = tl.dot(w3, x3, p2, out_dtype=tl.float32, input_precision="ieee")
            acc += p0 * tl.load(scale_ptr + at0)[:, None]
            acc += p2 * tl.load(scale_ptr + at2)[:, None]
        else:
            p0 = tl.dot(w1, x1, p0, out_dtype=tl.float32, input_precision="ieee")
            p0 = tl.dot(w2, x2, p0, out_dtype=tl.float32, input_precision="ieee")
            p0 = tl.dot(w3, x3, p0, out_dtype=tl.float32, input_precision="ieee")
            acc += p0 * tl.load(scale_ptr + at0)[:, None]
    return acc


@triton.jit
def _quarter(x_at, ok, left, Q: tl.constexpr, BM: tl.constexpr, EVEN: tl.constexpr):
    """[Q, BM] of x, whose first ``left`` rows exist."""
    if not EVEN:
        ok = ok & (tl.arange(0, Q)[:, None] < left)
    return tl.load(x_at, mask=ok, other=0.0)


@triton.jit
def _small_codes(x_ptr, x_row, w_ptr, width, scale_ptr, zero_ptr, row_scale_ptr, groups, bias_ptr, res_ptr, out_ptr,
                 parts_ptr, arrivals_ptr, M, N, K,
                 BM: tl.constexpr, BN: tl.constexpr, Q: tl.constexpr, SPLITS: tl.constexpr, FP4: tl.constexpr,
                 GROUP: tl.constexpr, PER: tl.constexpr, ZERO: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr,
                 GATE: tl.constexpr, RESIDUAL: tl.constexpr, PLAIN: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """out[m, n] for all M rows and BN columns, over one of SPLITS ranges of K; with a gate rows n and N + n."""
    if PDL:
        gdc_launch_dependents()
    tile = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    rows = tile * BN + tl.arange(0, BN)
    near = tl.minimum(rows, N - 1)  # rows past N repeat the last one
    m = tl.arange(0, BM)
    m_ok = m < M
    BK: tl.constexpr = 4 * Q
    span = (width * 4 // BK + SPLITS - 1) // SPLITS * BK
    lo = split * span
    hi = tl.minimum(lo + span, width * 4)
    ALL = N * 2 if GATE > 0 else N
    if PDL:
        lines = tl.arange(0, max(Q // 64, 1)) * 64
        ahead = w_ptr + near.to(tl.int64)[:, None] * width + lines[None, :]
        for k in range(lo, tl.minimum(hi, lo + 4 * BK), BK):
            prefetch_l2(ahead + k // 4)
            if GATE > 0:
                prefetch_l2(ahead + k // 4 + N.to(tl.int64) * width)
        gdc_wait()
    x_at = x_ptr + m[None, :].to(tl.int64) * x_row + tl.arange(0, Q)[:, None]
    ok = tl.broadcast_to(m_ok[None, :], (Q, BM))
    acc = tl.zeros([BN, BM], tl.float32)
    acc2 = tl.zeros([BN, BM], tl.float32)
    for k in range(lo, hi, BK):
        x0 = _quarter(x_at + k, ok, K - k, Q, BM, EVEN)
        x1 = _quarter(x_at + k + Q, ok, K - k - Q, Q, BM, EVEN)
        x2 = _quarter(x_at + k + 2 * Q, ok, K - k - 2 * Q, Q, BM, EVEN)
        x3 = _quarter(x_at + k + 3 * Q, ok, K - k - 3 * Q, Q, BM, EVEN)
        acc = _step(acc, x0, x1, x2, x3, w_ptr, scale_ptr, zero_ptr, near, k, width, ALL, groups, BN, Q, FP4, GROUP,
                    PER, ZERO, PLAIN)  # fmt: skip
        if GATE > 0:
            acc2 = _step(acc2, x0, x1, x2, x3, w_ptr, scale_ptr, zero_ptr, near + N, k, width, ALL, groups, BN, Q,
                         FP4, GROUP, PER, ZERO, PLAIN)  # fmt: skip
    last = True
    if SPLITS > 1:
        acc, acc2, last = gather_parts(
            acc, acc2, parts_ptr, arrivals_ptr, tile, split, m, BM, BN, SPLITS, GATE
        )
    if last:
        if FP4:
            UP: tl.constexpr = 65536.0 if GROUP == 16 and not PLAIN else 1.0
            acc = acc * (tl.load(row_scale_ptr + near) * UP)[:, None]
            if GATE > 0:
                acc2 = acc2 * (tl.load(row_scale_ptr + near + N) * UP)[:, None]
        finish(acc, acc2, rows, near, m, m_ok, bias_ptr, res_ptr, out_ptr, N, BIAS, GATE, RESIDUAL)


@triton.jit
def _dequantize(w_ptr, width, scale_ptr, zero_ptr, row_scale_ptr, groups, out_ptr, N, K, BN: tl.constexpr,
                Q: tl.constexpr, FP4: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr):  # fmt: skip
    """One tile of BN rows: float32 products of code and scales, rounded once."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    near = tl.minimum(rows, N - 1)
    cols = tl.arange(0, Q)
    k = tl.program_id(1) * (4 * Q)
    w = tl.load(w_ptr + near.to(tl.int64)[:, None] * width + (k // 4 + cols)[None, :]).to(tl.int32)
    for i in tl.static_range(4):
        at_k = k + i * Q
        if FP4:
            at = near.to(tl.int64)[:, None] * groups + (at_k // GROUP + tl.arange(0, Q // GROUP))[None, :]
            # The product of the two scales is rounded first, as the definition has it.
            scale = _scales(scale_ptr + at, BN, Q, GROUP)
            ones = tl.full([BN, Q], 0x76807680 if GROUP == 16 else 0x3F803F80, tl.int32)
            factor = (scale << 16).to(tl.float32, bitcast=True) * (2.0**-110 if GROUP == 16 else 1.0)
            value = _plain_fp4(w, ones, i, GROUP) * (factor * tl.load(row_scale_ptr + near)[:, None])
        else:
            codes = (w >> (4 * i)) & 15
            at = tl.minimum(at_k // GROUP, groups - 1).to(tl.int64) * N + near
            zero = -136.0
            if ZERO:
                zero = tl.load(zero_ptr + at).to(tl.float32)[:, None]
            value = (codes.to(tl.float32) + 128.0 + zero) * tl.load(scale_ptr + at)[:, None]
        ok = (rows < N)[:, None] & (at_k + cols < K)[None, :]
        to = out_ptr + rows.to(tl.int64)[:, None] * K + (at_k + cols)[None, :]
        tl.store(to, value.to(out_ptr.dtype.element_ty), mask=ok)


def four_bit_product(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    *,
    rows: int,
    group: int,
    quarter: int,
    zero: Tensor | None = None,
    row_scale: Tensor | None = None,
    bias: Tensor | None = None,
    gate: str | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype,
    shape: CodesShape | None = None,
) -> Tensor:
    """``act(x @ weight.T + bias) + residual`` with float32 sums, rounded once at the end.

    Args:
        x: [M, K], M at most MAX_ROWS.
        words, scale, zero, row_scale, group, quarter: of a quantization.tiled.TiledWeight; FP4 has a row_scale.
        rows: of the weight.
        gate: the first half of the outputs go through it and multiply the others.
    """
    num_rows, k = x.shape
    n = rows // (1 if gate is None else 2)
    assert num_rows <= MAX_ROWS and x.stride(1) == 1 and words.is_contiguous()
    width = words.shape[1]
    shape = shape or codes_shape(x.device, num_rows, rows, k, row_scale is not None, gate is not None)
    bm = padded_rows(num_rows)
    splits = min(shape.splits, width // quarter)
    tiles = triton.cdiv(n, shape.bn)
    out = torch.empty(num_rows, n, dtype=out_dtype, device=x.device)
    parts = arrivals = out
    if splits > 1:
        tall = (1 if gate is None else 2) * shape.bn
        parts, arrivals = _SCRATCH.get(x.device, tiles * splits * tall * bm, tiles)
    fp4 = row_scale is not None
    _small_codes[(tiles * splits,)](
        x, x.stride(0), words, width, scale, scale if zero is None else zero, scale if row_scale is None else row_scale,
        scale.shape[1] if fp4 else scale.shape[0], x if bias is None else bias, x if residual is None else residual,
        out, parts, arrivals, num_rows, n, k,
        BM=bm, BN=shape.bn, Q=quarter, SPLITS=splits, FP4=fp4, GROUP=group, PER=_sharing(group, quarter),
        ZERO=zero is not None, EVEN=k == width * 4, BIAS=bias is not None, GATE=_GATES[gate],
        RESIDUAL=residual is not None, PLAIN=INTERPRETED or x.dtype is not torch.bfloat16,
        **launch_options(x.device, shape.warps, shape.stages),
    )  # fmt: skip
    return out


def dequantize_codes(
    words: Tensor,
    scale: Tensor,
    *,
    rows: int,
    columns: int,
    group: int,
    quarter: int,
    zero: Tensor | None = None,
    row_scale: Tensor | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """A TiledWeight -> [rows, columns] of ``dtype``, each number rounded once from float32."""
    width, fp4 = words.shape[1], row_scale is not None
    out = torch.empty(rows, columns, dtype=dtype, device=words.device)
    _dequantize[(triton.cdiv(rows, 32), width // quarter)](
        words, width, scale, scale if zero is None else zero, scale if row_scale is None else row_scale,
        scale.shape[1] if fp4 else scale.shape[0], out, rows, columns,
        BN=32, Q=quarter, FP4=fp4, GROUP=group, ZERO=zero is not None, num_warps=4,
    )  # fmt: skip
    return out


def _sharing(group: int, quarter: int) -> int:
    """How many quarters of a tile, one after another, share a scale for sure."""
    return 4 if group % (4 * quarter) == 0 else 2 if group % (2 * quarter) == 0 else 1
