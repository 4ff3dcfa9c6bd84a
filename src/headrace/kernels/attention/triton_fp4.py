"""Rows of an FP4 cache in Triton (fp4.py says what they are)."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["load_fp4", "round_fp4", "store_fp4"]

_OFFSET = tl.constexpr((127 - 24) * 8)


@triton.jit
def _values(codes, scale, ROWS: tl.constexpr, DP: tl.constexpr):
    """uint8 codes [ROWS, DP / 2] under scales [ROWS, DP / 16] -> float32 [ROWS, DP]."""
    low = codes.to(tl.int32) & 15
    high = codes.to(tl.int32) >> 4
    both = tl.interleave(low, high)
    bits = ((both & 7) << 9) | ((both & 8) << 12)
    values = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
    factor = ((scale.to(tl.int32) + _OFFSET) << 20).to(tl.float32, bitcast=True)
    factor = tl.where(scale == 255, float("nan"), factor)
    wide = tl.broadcast_to(factor[:, :, None], (ROWS, DP // 16, 16)).reshape(ROWS, DP)
    return values * wide


@triton.jit
def load_fp4(base, slot, ok, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, dtype: tl.constexpr):
    """Rows at bytes ``slot`` [ROWS] -> [ROWS, DP] of ``dtype``; zero where not ``ok`` and past D."""
    c = tl.arange(0, DP // 2)[None, :]
    s = tl.arange(0, DP // 16)[None, :]
    # Rows begin at multiples of their size: said so, as many bytes as that allows are loaded at once.
    WIDTH: tl.constexpr = D // 2 + D // 16
    ALIGNED: tl.constexpr = 16 if WIDTH % 16 == 0 else 8 if WIDTH % 8 == 0 else 4 if WIDTH % 4 == 0 else 1
    at = base + (slot // ALIGNED * ALIGNED)[:, None]
    codes = tl.load(at + c, mask=ok[:, None] & (c < D // 2), other=0)
    scale = tl.load(at + D // 2 + s, mask=ok[:, None] & (s < D // 16), other=0)
    return _values(codes, scale, ROWS, DP).to(dtype)


@triton.jit
def round_fp4(x, ROWS: tl.constexpr, DP: tl.constexpr):
    """float32 [ROWS, DP] -> codes uint8 [ROWS, DP / 2], scales uint8 [ROWS, DP / 16], and what they stand for."""
    groups = x.reshape(ROWS, DP // 16, 16)
    peak = tl.max(tl.abs(groups), 2)
    broken = tl.sum(groups * 0.0, 2) != 0.0  # NaN or infinity times 0 is NaN
    bits = ((peak / 6.0).to(tl.int32, bitcast=True) + (1 << 19)) >> 20
    bits = tl.minimum(tl.maximum(bits - _OFFSET, 0), 254)
    factor = ((bits + _OFFSET) << 20).to(tl.float32, bitcast=True)
    scale = tl.where(broken, 255, bits).to(tl.uint8)
    # Half-way points between neighbours, times the scale: exact, where a division of the device's would not be.
    m = tl.abs(groups)
    f = factor[:, :, None]
    code = (m > 0.25 * f).to(tl.int32) + (m >= 0.75 * f).to(tl.int32) + (m > 1.25 * f).to(tl.int32)
    code += (m >= 1.75 * f).to(tl.int32) + (m > 2.5 * f).to(tl.int32) + (m >= 3.5 * f).to(tl.int32)
    code += (m > 5.0 * f).to(tl.int32)
    sign = (groups.to(tl.int32, bitcast=True) >> 28) & 8
    low, high = tl.split((code | sign).reshape(ROWS, DP // 2, 2))
    codes = (low | (high << 4)).to(tl.uint8)
    return codes, scale, _values(codes, scale, ROWS, DP)


@triton.jit
def store_fp4(base, slot, codes, scale, ok, D: tl.constexpr, DP: tl.constexpr):
    """Write rows of ``round_fp4`` at bytes ``slot`` [ROWS]."""
    c = tl.arange(0, DP // 2)[None, :]
    s = tl.arange(0, DP // 16)[None, :]
    at = base + slot[:, None]
    tl.store(at + c, codes, mask=ok[:, None] & (c < D // 2))
    tl.store(at + D // 2 + s, scale, mask=ok[:, None] & (s < D // 16))
