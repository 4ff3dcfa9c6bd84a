"""Operands of the tensor cores from 4-bit words: what triton_codes.py multiplies, and how tiling.py's order unfolds.

Loads are two-dimensional, [parts of warps, lanes and their words], so that the compiler gives each lane the words that
lie next to one another; all that follows is renaming of registers. Shapes here: T tiles of 16 rows, two chunks c of 64
columns, W warps side by side in K, lanes (g, t), words i, and of a word (a, h, b): quarter (a, h), half b.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "E2M1_QUARTERS",
    "by_lane",
    "decode_fp4",
    "decode_integers",
    "found_rows",
    "input_columns",
    "input_rows",
    "inputs",
    "lane_offsets",
    "operand",
    "row_factors",
    "tile_of",
]


E2M1_QUARTERS = tl.constexpr("""
{
.reg .b32 a, b, z;
mov.b32 z, 0x80008000;
and.b32 a, $4, 0x81C081C0;
fma.rn.bf16x2 $0, a, $5, z;
shl.b32 a, $4, 3;
and.b32 a, a, 0x81C081C0;
fma.rn.bf16x2 $1, a, $6, z;
shl.b32 a, $4, 6;
and.b32 a, a, 0x81C081C0;
fma.rn.bf16x2 $2, a, $5, z;
shl.b32 a, $4, 1;
and.b32 a, a, 0x80008000;
shr.b32 b, $4, 4;
lop3.b32 a, b, 0x00C000C0, a, 0xEA;
shr.b32 b, $4, 5;
lop3.b32 a, b, 0x01000100, a, 0xEA;
fma.rn.bf16x2 $3, a, $6, z;
}
""")
"""Instructions: four pairs of bfloat16 of E2M1 in int32 $4, times 2**-126 and the scales of both rows, $5 and $6."""


@triton.jit
def tile_of(which, tile, N, R, T: tl.constexpr, GATE: tl.constexpr):
    """Which tile of rows the program's tile ``which`` is, of R; with a gate its second half belongs to rows N + n."""
    if GATE > 0:
        at = tile * (T // 2) + which % (T // 2) + (which // (T // 2)) * (N // 16)
    else:
        at = tile * T + which
    return tl.minimum(at, R - 1).to(tl.int64)


@triton.jit
def input_columns(block, W: tl.constexpr, BM: tl.constexpr, E: tl.constexpr):
    """Where lanes find the first halves of x's 128 columns from each of W blocks on: columns, int32 [BM W / 4, 256]."""
    r = tl.arange(0, BM * W // 4)
    j = tl.arange(0, 256) % 32
    return ((block + r % W) * 128 + r // W % 2 * 64)[:, None] + (j // 8 * E + j % 8)[None, :]


@triton.jit
def input_rows(W: tl.constexpr, BM: tl.constexpr):
    """The rows of x that belong to them."""
    return (tl.arange(0, BM * W // 4) // (2 * W) * 8)[:, None] + (tl.arange(0, 256) // 32)[None, :]


@triton.jit
def found_rows(at, count, W: tl.constexpr, BM: tl.constexpr):
    """What lies at ``at`` + ``input_rows``, of which there are ``count``: beyond, the last of them."""
    R: tl.constexpr = BM * W // 4
    row = (tl.arange(0, 32) // 4)[None, :, None] + (tl.arange(0, R) // (2 * W) * 8)[None, None, :]
    found = by_lane(at + tl.max_contiguous(tl.minimum(row, count - 1), (1, 1, 1)), R)
    return tl.broadcast_to(found[:, :, None], (R, 32, 8)).reshape(R, 256)


@triton.jit
def inputs(x_at, eighth, end, HALF: tl.constexpr, EVEN: tl.constexpr):
    """x at x_at, whose columns (``input_columns``) are in eights ``eighth``, HALF further; 0 from ``end`` eights on."""
    if EVEN:
        x = tl.load(x_at + HALF)
    else:
        x = tl.load(x_at + HALF, mask=eighth + HALF // 8 < end, other=0.0)
    return x


@triton.jit
def operand(x0, x1, W: tl.constexpr, BM: tl.constexpr):
    """Both halves of ``inputs`` -> [W, 128, BM]."""
    both = tl.join(x0.reshape(BM // 8, 2, W, 8, 4, 2, 2, 2), x1.reshape(BM // 8, 2, W, 8, 4, 2, 2, 2))
    return both.permute(2, 1, 8, 6, 4, 5, 7, 0, 3).reshape(W, 128, BM)  # from (m c w m t i a b half)


@triton.jit
def lane_offsets(per_lane, base):
    """int64 [1, 32, P] of [32] and [P], such that the compiler gives each lane one number and reads none wider.

    Three dimensions, so that no store of the same shape lends this load its layout.
    """
    return tl.max_contiguous(per_lane[None, :, None] + base[None, None, :], (1, 1, 1))


@triton.jit
def by_lane(at, P: tl.constexpr):
    """What lies at ``at`` [1, 32, P], each lane of a warp its own: [P, 32]."""
    return tl.load(at).permute(0, 2, 1).reshape(P, 32)


@triton.jit
def _weights(q00, q01, q10, q11, T: tl.constexpr, W: tl.constexpr):
    """Quarters (a, h), each [T, 2, W, 8, 4, 4, 2] -> [W, 16 T, 128]."""
    w = tl.join(tl.join(q00, q10), tl.join(q01, q11))  # T c w g t i b a h
    w = w.reshape(T, 2, W, 8, 4, 2, 2, 2, 2, 2)  # i in halves
    return w.permute(2, 0, 9, 3, 1, 5, 8, 4, 6, 7).reshape(W, 16 * T, 128)


@triton.jit
def _pair(word):
    """int32 -> its two bfloat16, in a new last dimension."""
    low = word.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.join(low, (word >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True))


@triton.jit
def _fp4_scales(
    words, H: tl.constexpr, GROUP: tl.constexpr, SMALL: tl.constexpr, T: tl.constexpr, W: tl.constexpr
):
    """Scales of row g + 8 H, a bfloat16 twice in int32 [T, 2, W, 8, 4, 4]: of 16 columns, times 2**110; of 32, 2**e,
    where they are SMALL times 2**126.

    words: int32 [T W, 32], see tiling.tile_scales.
    """
    e = tl.join((words >> (8 * H)) & 255, (words >> (8 * H + 16)) & 255)
    e = e.reshape(T, W, 8, 4, 2).permute(0, 4, 1, 2, 3)
    if GROUP == 16:
        twice = e * 0x00100010 + 0x70007000
    elif SMALL:
        twice = e * 0x00800080 + 0x3F003F00
    else:
        twice = tl.where(e == 0, 0x0040, tl.where(e == 255, 0x7FC0, e * 128)) * 0x00010001
    return tl.broadcast_to(twice[:, :, :, :, :, None], (T, 2, W, 8, 4, 4))


@triton.jit
def _e2m1_quarters(w, s0, s1):
    """int32 -> four pairs of bfloat16 of E2M1 times scale times 2**-126; scales of both rows, a bfloat16 twice.

    A code's bits are those of a bfloat16 of the lowest exponents, subnormals included; tiling.py lays them so that a
    shift and a mask find them, the last quarter's with four more operations.
    """
    return tl.inline_asm_elementwise(
        E2M1_QUARTERS,
        "=&r,=&r,=&r,=&r,r,r,r",
        [w, s0, s1],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _integer_quarters(w, z0, z1):
    """int32 -> four pairs of bfloat16 of ``code - zero``, exact, given ``-128 - zero`` of both rows twice."""
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
        fma.rn.bf16x2 $2, a, one, $5;
        shr.b32 a, $4, 12;
        lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA;
        fma.rn.bf16x2 $3, a, one, $6;
        }
        """,
        "=&r,=&r,=&r,=&r,r,r,r",
        [w, z0, z1],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _plain_fp4(w, scale, i: tl.constexpr, GROUP: tl.constexpr):
    """Quarter i of the lower halves of int32 words under scales of ``_fp4_scales``, float32."""
    if i < 3:
        bits = w << (3 * i)
    else:
        bits = ((w << 1) & 0x8000) | ((w >> 4) & 0x00C0) | ((w >> 5) & 0x0100)
    half = (bits & 0x8000) | ((bits & 0x01C0) << 3)
    value = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
    FACTOR: tl.constexpr = 2.0**-110 if GROUP == 16 else 1.0
    return value * ((scale << 16).to(tl.float32, bitcast=True) * FACTOR)


@triton.jit
def _plain_pair(w, s, i: tl.constexpr, kind: tl.constexpr, FP4: tl.constexpr, GROUP: tl.constexpr):
    """Quarter i of both halves; s: scales of FP4, ``-128 - zero`` of integers."""
    if FP4:
        low, high = _plain_fp4(w, s, i, GROUP), _plain_fp4(w >> 16, s, i, GROUP)
    else:
        low = ((w >> (4 * i)) & 15).to(tl.float32) + 128.0 + s
        high = ((w >> (4 * i + 16)) & 15).to(tl.float32) + 128.0 + s
    return tl.join(low.to(kind), high.to(kind))


@triton.jit
def _scaled(pair, scale):
    """Pairs of bfloat16 times the scale that int32 holds twice."""
    return pair * scale.to(tl.int16).to(tl.bfloat16, bitcast=True)[:, :, :, :, :, :, None]


@triton.jit
def decode_fp4(words, scales, kind: tl.constexpr, T: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr,
               SMALL: tl.constexpr, PLAIN: tl.constexpr):  # fmt: skip
    """int32 [2 T W, 128] and [T W, 32] -> ``kind`` [W, 16 T, 128]; of 16 columns a scale times 2**-16 unless PLAIN.

    SMALL: of 32 columns no scale is above 2, and none NaN.
    """
    w = words.reshape(T, 2, W, 8, 4, 4)
    s0 = _fp4_scales(scales, 0, GROUP, SMALL and not PLAIN, T, W)
    s1 = _fp4_scales(scales, 1, GROUP, SMALL and not PLAIN, T, W)
    if PLAIN:
        q00 = _plain_pair(w, s0, 0, kind, True, GROUP)
        q01 = _plain_pair(w, s1, 1, kind, True, GROUP)
        q10 = _plain_pair(w, s0, 2, kind, True, GROUP)
        q11 = _plain_pair(w, s1, 3, kind, True, GROUP)
    elif GROUP == 16 or SMALL:
        p00, p01, p10, p11 = _e2m1_quarters(w, s0, s1)
        q00, q01, q10, q11 = _pair(p00), _pair(p01), _pair(p10), _pair(p11)
    else:
        up = tl.full([T, 2, W, 8, 4, 4], 0x7E807E80, tl.int32)  # 2**126 twice
        p00, p01, p10, p11 = _e2m1_quarters(w, up, up)
        q00, q01 = _scaled(_pair(p00), s0), _scaled(_pair(p01), s1)
        q10, q11 = _scaled(_pair(p10), s0), _scaled(_pair(p11), s1)
    return _weights(q00, q01, q10, q11, T, W)


@triton.jit
def _zeros(zero_ptr, rows, block, groups, H: tl.constexpr, T: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr,
           ZERO: tl.constexpr, PLAIN: tl.constexpr):  # fmt: skip
    """``-128 - zero`` of row g + 8 H for each word, float32 or a bfloat16 twice in int32."""
    if ZERO:
        r = tl.arange(0, 2 * T * W)
        lane = 8 * H + tl.arange(0, 32) // 4
        col = (block + r % W) * 128 + r // W % 2 * 64
        near = rows + tl.minimum(col // GROUP, groups - 1)
        z0 = by_lane(zero_ptr + lane_offsets(lane, near * 16), 2 * T * W)
        z1 = z0
        if GROUP % 64 != 0:
            far = rows + tl.minimum((col + 32) // GROUP, groups - 1)
            z1 = by_lane(zero_ptr + lane_offsets(lane, far * 16), 2 * T * W)
        z = tl.join(z0, z1)
        if PLAIN:
            z = z.to(tl.float32)
        else:
            z = (z.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) * 0x00010001
        z = z.reshape(T, 2, W, 8, 4, 2)[:, :, :, :, :, :, None]
        return tl.broadcast_to(z, (T, 2, W, 8, 4, 2, 2)).reshape(T, 2, W, 8, 4, 4)
    elif PLAIN:
        return tl.full([T, 2, W, 8, 4, 4], -136.0, tl.float32)
    else:
        return tl.full([T, 2, W, 8, 4, 4], -1022835960, tl.int32)  # 0xC308C308: -136 twice


@triton.jit
def decode_integers(words, zero_ptr, rows, block, groups, kind: tl.constexpr, T: tl.constexpr, W: tl.constexpr,
                    GROUP: tl.constexpr, ZERO: tl.constexpr, PLAIN: tl.constexpr):  # fmt: skip
    """int32 [2 T W, 128] -> ``code - zero`` [W, 16 T, 128]; rows [2 T W]: tile of rows times groups."""
    w = words.reshape(T, 2, W, 8, 4, 4)
    z0 = _zeros(zero_ptr, rows, block, groups, 0, T, W, GROUP, ZERO, PLAIN)
    z1 = _zeros(zero_ptr, rows, block, groups, 1, T, W, GROUP, ZERO, PLAIN)
    if PLAIN:
        q00 = _plain_pair(w, z0, 0, kind, False, GROUP)
        q01 = _plain_pair(w, z1, 1, kind, False, GROUP)
        q10 = _plain_pair(w, z0, 2, kind, False, GROUP)
        q11 = _plain_pair(w, z1, 3, kind, False, GROUP)
    else:
        p00, p01, p10, p11 = _integer_quarters(w, z0, z1)
        q00, q01, q10, q11 = _pair(p00), _pair(p01), _pair(p10), _pair(p11)
    return _weights(q00, q01, q10, q11, T, W)


@triton.jit
def row_factors(factor_ptr, rows, col, groups, T: tl.constexpr, W: tl.constexpr, BM: tl.constexpr,
                GROUP: tl.constexpr):  # fmt: skip
    """Scales of integers as the sums lie: float32 [W, 16 T, BM]; rows [T W]: tile of rows times groups; col [T W]."""
    near = rows + tl.minimum(col // GROUP, groups - 1)
    at = factor_ptr + lane_offsets(tl.arange(0, 32) // 4, near * 16)
    each = tl.join(by_lane(at, T * W), by_lane(at + 8, T * W))
    each = each.reshape(T, W, 8, 4, 2).permute(1, 0, 4, 2, 3)  # w T h g t
    wide = tl.broadcast_to(each[:, :, :, :, None, :, None], (W, T, 2, 8, BM // 8, 4, 2))
    return wide.reshape(W, 16 * T, BM)
