"""Caches of 8 and 4 bits a number, read as 16-bit words on their way to the tensor cores.

A product of 16-bit operands takes pairs of neighbouring rows or columns in a register. Bytes would have to be loaded
and paired one by one; words come as the tensor cores want them, also transposed, and few instructions make 16-bit
floats of the same part of two words. So a tile of keys or values is two tiles (FP8) or four (FP4): the i-th holds
every second or fourth dimension, and so do the tiles of queries and sums. Keys and values are the wide side of their
products, values transposed (TURNED): as the narrow one, queries need no more than 8 columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headrace.kernels.attention.triton_fp4 import round_fp4

__all__ = [
    "join_bytes",
    "round_fp8",
    "split_columns",
    "store_words",
    "to_half_range",
    "turned",
    "widen_fp4",
    "widen_fp8",
]

_OFFSET = tl.constexpr((127 - 24) * 8)


@triton.jit
def _fp8_halves(words):
    """int16 words of two E4M3 numbers -> float16 of the first and of the second, two words a time; NaN stays."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 a;
        .reg .b16 lo, hi;
        prmt.b32 a, $2, 0, 0x3120;
        mov.b32 {lo, hi}, a;
        cvt.rn.f16x2.e4m3x2 $0, lo;
        cvt.rn.f16x2.e4m3x2 $1, hi;
        }
        """,
        "=r,=r,r",
        [words],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _fp8_value(code):
    """The same of int32 codes, to float32, by plain operations (the interpreter reads NaN as 480)."""
    value = code.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return tl.where(code & 127 == 127, float("nan"), value)


@triton.jit
def widen_fp8(words, dtype: tl.constexpr, PLAIN: tl.constexpr):
    """int16 [M, N] -> (first, second) of each word, [M, N] of ``dtype``."""
    if PLAIN:
        bits = words.to(tl.int32)
        lo, hi = _fp8_value(bits & 255), _fp8_value((bits >> 8) & 255)
    else:
        lo, hi = _fp8_halves(words)
    return lo.to(dtype), hi.to(dtype)


@triton.jit
def round_fp8(x):
    """float32 -> float32 of E4M3: to nearest, ties to even, at most 448; NaN stays.

    By arithmetic: where codes of one kernel were packed and then widened again, ptxas (of CUDA 12.8, for sm_90) read a
    register of them before it was written, in programs of one warp (0071).
    """
    size = tl.where(tl.abs(x) > 448.0, 448.0, tl.abs(x))
    bits = size.to(tl.int32, bitcast=True)
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    tiny = ((size + 24576.0) - 24576.0).to(tl.int32, bitcast=True)  # whose last place is 2**-9
    rounded = tl.where(size < 0.015625, tiny, normal) | (x.to(tl.int32, bitcast=True) & -0x80000000)
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def join_bytes(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """uint8 [ROWS, 2 * WIDTH] -> int16 [ROWS, WIDTH]."""
    lo, hi = tl.split(x.reshape(ROWS, WIDTH, 2))
    return (lo.to(tl.int32) | (hi.to(tl.int32) << 8)).to(tl.int16)


@triton.jit
def _fp4_quarters(words, scales):
    """int16 words of four E2M1 codes, two a time, times their bfloat16 scales, times 2**-126: four bfloat16."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 a, b, z;
        mov.b32 z, 0x80008000;
        shl.b32 a, $4, 6;
        and.b32 a, a, 0x01C001C0;
        shl.b32 b, $4, 12;
        lop3.b32 a, b, 0x80008000, a, 0xEA;
        fma.rn.bf16x2 $0, a, $5, z;
        shl.b32 a, $4, 2;
        and.b32 a, a, 0x01C001C0;
        shl.b32 b, $4, 8;
        lop3.b32 a, b, 0x80008000, a, 0xEA;
        fma.rn.bf16x2 $1, a, $5, z;
        shr.b32 a, $4, 2;
        and.b32 a, a, 0x01C001C0;
        shl.b32 b, $4, 4;
        lop3.b32 a, b, 0x80008000, a, 0xEA;
        fma.rn.bf16x2 $2, a, $5, z;
        shr.b32 a, $4, 6;
        and.b32 a, a, 0x01C001C0;
        lop3.b32 a, $4, 0x80008000, a, 0xEA;
        fma.rn.bf16x2 $3, a, $5, z;
        }
        """,
        "=&r,=&r,=&r,=&r,r,r",
        [words, scales],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _fp4_value(code, factor):
    """E2M1 codes, int32, times float32 factors."""
    bits = ((code & 7) << 9) | ((code & 8) << 12)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0 * factor


@triton.jit
def widen_fp4(words, scales, ROWS: tl.constexpr, WIDTH: tl.constexpr, dtype: tl.constexpr, PLAIN: tl.constexpr,
              TURNED: tl.constexpr):  # fmt: skip
    """int16 words [ROWS, WIDTH] and words of two scales [ROWS, WIDTH / 8] -> four tiles [ROWS, WIDTH] of ``dtype``.

    Unless PLAIN they are bfloat16 and 2**-16 of what they stand for, exactly. TURNED: all of them are transposed.
    """
    pairs = scales.to(tl.int32)
    each = tl.join(pairs & 255, (pairs >> 8) & 255)
    if TURNED:
        each = tl.permute(each, (0, 2, 1)).reshape(WIDTH // 4, ROWS)
    else:
        each = each.reshape(ROWS, WIDTH // 4)
    if PLAIN:
        factor = ((each + _OFFSET) << 20).to(tl.float32, bitcast=True)
        factor = tl.where(each == 255, float("nan"), factor)
    else:  # times 2**110
        factor = tl.where(each == 255, 0x7FC0, (each + (_OFFSET + 110 * 8)) << 4)
        factor = factor.to(tl.int16).to(tl.bfloat16, bitcast=True)
    if TURNED:
        factor = tl.broadcast_to(factor[:, None, :], (WIDTH // 4, 4, ROWS)).reshape(WIDTH, ROWS)
    else:
        factor = tl.broadcast_to(factor[:, :, None], (ROWS, WIDTH // 4, 4)).reshape(ROWS, WIDTH)
    if PLAIN:
        w = words.to(tl.int32)
        x0, x1 = _fp4_value(w & 15, factor), _fp4_value((w >> 4) & 15, factor)
        x2, x3 = _fp4_value((w >> 8) & 15, factor), _fp4_value((w >> 12) & 15, factor)
    else:
        x0, x1, x2, x3 = _fp4_quarters(words, factor)
    return x0.to(dtype), x1.to(dtype), x2.to(dtype), x3.to(dtype)


@triton.jit
def split_columns(x, ROWS: tl.constexpr, DP: tl.constexpr, PARTS: tl.constexpr):
    """[ROWS, DP] -> a tuple of PARTS tiles [ROWS, DP / PARTS], the i-th of columns i, i + PARTS ..."""
    if PARTS == 1:
        parts = (x,)
    elif PARTS == 2:
        parts = tl.split(x.reshape(ROWS, DP // 2, 2))
    else:
        even, odd = tl.split(x.reshape(ROWS, DP // 4, 2, 2))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        parts = (x0, x1, x2, x3)  # type: ignore[assignment]
    return parts


@triton.jit
def turned(parts, PARTS: tl.constexpr):
    """Each of a tuple of tiles, transposed."""
    found = ()
    for i in tl.static_range(PARTS):
        found = found + (tl.trans(parts[i]),)  # type: ignore[assignment]  # noqa: RUF005
    return found


@triton.jit
def to_half_range(q):
    """Queries [H, DP] as (numbers that float16 holds, float32 [H] powers of two to multiply their scores by)."""
    q = q.to(tl.float32)
    peak = tl.max(tl.abs(q), 1).to(tl.int32, bitcast=True) & 0x7F800000
    peak = tl.minimum(tl.maximum(peak, 64 << 23), 190 << 23)
    inverse = ((254 << 23) - peak).to(tl.float32, bitcast=True)
    return (q * inverse[:, None]).to(tl.float16), peak.to(tl.float32, bitcast=True)


@triton.jit
def store_words(base, x, ok, D: tl.constexpr, DP: tl.constexpr, PARTS: tl.constexpr):
    """Write a row [1, DP] at ``base`` of an FP8 or FP4 cache of words; returns what it then stands for, float32."""
    w = tl.arange(0, DP // PARTS)[None, :]
    if PARTS == 2:
        value = round_fp8(x.to(tl.float32))
        words = join_bytes(value.to(tl.float8e4nv).to(tl.uint8, bitcast=True), 1, DP // 2)
    else:
        codes, scales, value = round_fp4(x.to(tl.float32), 1, DP)
        words = join_bytes(codes, 1, DP // 4)
        s = tl.arange(0, DP // 32)[None, :]
        tl.store(base + D // 4 + s, join_bytes(scales, 1, DP // 32), mask=ok & (s < D // 32))
    tl.store(base + w, words, mask=ok & (w < D // PARTS))
    return value
