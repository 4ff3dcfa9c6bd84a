"""Rotary embedding and the norm of heads on GPUs, in place: one program a token, all its heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.kernels.launch import launch_options

if TYPE_CHECKING:
    from headrace.layers.packed import LayerCache

__all__ = ["norm_rope_store", "qk_norm_rope", "rope"]


@triton.jit
def _norm_rope(x_ptr, x_row, x_head, gain_ptr, cos_ptr, sin_ptr, H, eps,
               HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr,
               PDL: tl.constexpr):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, DP)[None, :]
    half: tl.constexpr = R // 2
    swap = tl.where(d < half, d + half, tl.where(d < R, d - half, d))
    ok = (h < H) & (d < D)
    at = x_ptr + token * x_row + h * x_head
    x = tl.load(at + d, mask=ok, other=0.0).to(tl.float32)
    other = x
    if R > 0:
        other = tl.load(at + swap, mask=ok, other=0.0).to(tl.float32)
    # Other threads' loads must come before this thread's stores.
    tl.debug_barrier()
    if NORM:
        rs = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        gains = gain_ptr + h * D
        x = (x * rs * tl.load(gains + d, mask=ok, other=0.0).to(tl.float32)).to(x_ptr.dtype.element_ty)
        x = x.to(tl.float32)
        if R > 0:
            other = other * rs * tl.load(gains + swap, mask=ok, other=0.0).to(tl.float32)
            other = other.to(x_ptr.dtype.element_ty).to(tl.float32)
    if R > 0:
        cos = tl.load(cos_ptr + token * R + d, mask=d < R, other=1.0)
        sin = tl.load(sin_ptr + token * R + d, mask=d < R, other=0.0)
        x = x * cos + other * sin
    tl.store(at + d, x.to(x_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _norm_rope_whole(x_ptr, x_row, x_head, gain_ptr, cos_ptr, sin_ptr, H, eps, HEADS: tl.constexpr,
                     HALF: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """The same where all of a head turns: its halves are read once each, by the threads that write them."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, HALF)[None, :]
    ok = h < H
    at = x_ptr + token * x_row + h * x_head + d
    a = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask=ok, other=0.0).to(tl.float32)
    angle = token * (2 * HALF) + d
    cos_a, cos_b = tl.load(cos_ptr + angle), tl.load(cos_ptr + angle + HALF)
    sin_a, sin_b = tl.load(sin_ptr + angle), tl.load(sin_ptr + angle + HALF)
    dtype = x_ptr.dtype.element_ty
    if NORM:
        rs = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
        gains = gain_ptr + h * (2 * HALF) + d
        a = (a * rs * tl.load(gains, mask=ok, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
        b = (b * rs * tl.load(gains + HALF, mask=ok, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
    tl.store(at, (a * cos_a + b * sin_a).to(dtype), mask=ok)
    tl.store(at + HALF, (b * cos_b + a * sin_b).to(dtype), mask=ok)


@triton.jit
def _norm_rope_store(
    x_ptr, x_row, x_head, gain_ptr, cos_ptr, sin_ptr, HQ, HKV, eps, k_cache, v_cache, cache_block, cache_token,
    cache_head, slots_ptr, BLOCK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """As _norm_rope_whole for query and key heads; keys go to the cache too, and so do the value heads behind them."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, HALF)[None, :]
    turns = h < HQ + HKV
    ok = h < HQ + 2 * HKV
    at = x_ptr + token * x_row + h * x_head + d
    a = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask=ok, other=0.0).to(tl.float32)
    angle = token * (2 * HALF) + d
    cos_a, cos_b = tl.load(cos_ptr + angle), tl.load(cos_ptr + angle + HALF)
    sin_a, sin_b = tl.load(sin_ptr + angle), tl.load(sin_ptr + angle + HALF)
    dtype = x_ptr.dtype.element_ty
    left, right = a, b
    if NORM:
        rs = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
        gains = gain_ptr + h * (2 * HALF) + d
        left = a * rs * tl.load(gains, mask=turns, other=0.0).to(tl.float32)
        right = b * rs * tl.load(gains + HALF, mask=turns, other=0.0).to(tl.float32)
        left, right = left.to(dtype).to(tl.float32), right.to(dtype).to(tl.float32)
    new_a = tl.where(turns, left * cos_a + right * sin_a, a).to(dtype)
    new_b = tl.where(turns, right * cos_b + left * sin_b, b).to(dtype)
    tl.store(at, new_a, mask=turns)
    tl.store(at + HALF, new_b, mask=turns)
    to = (slot // BLOCK) * cache_block + (slot % BLOCK) * cache_token + d
    keep = (h >= HQ) & ok & (slot >= 0)
    # One of the two caches for each head.
    place = tl.where(turns, k_cache + to + (h - HQ) * cache_head, v_cache + to + (h - HQ - HKV) * cache_head)
    tl.store(place, new_a, mask=keep)
    tl.store(place + HALF, new_b, mask=keep)


def norm_rope_store(
    qkv: Tensor, num_kv_heads: int, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor, cache: LayerCache,
    slots: Tensor,
) -> bool:  # fmt: skip
    tokens, heads, dim = qkv.shape
    k, v = cache.k, cache.v
    whole = cos.shape[-1] == dim == triton.next_power_of_2(dim)
    if (
        not whole
        or k.dtype != qkv.dtype
        or qkv.stride(2) != 1
        or k.stride() != v.stride()
        or k.stride(3) != 1
    ):
        return False
    block = max(1, min(triton.next_power_of_2(heads), 2048 // dim))
    _norm_rope_store[(tokens, triton.cdiv(heads, block))](
        qkv, qkv.stride(0), qkv.stride(1), qkv if weight is None else weight, cos.contiguous(), sin.contiguous(),
        heads - 2 * num_kv_heads, num_kv_heads, eps, k, v, *k.stride()[:3], slots, BLOCK=k.shape[1], HEADS=block,
        HALF=dim // 2, NORM=weight is not None, **launch_options(qkv.device, 4, 1),
    )  # fmt: skip
    return True


def _launch(qk: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    tokens, heads, dim = qk.shape
    if qk.stride(2) != 1:
        qk = qk.contiguous()
    width = 0 if cos is None else cos.shape[-1]
    padded = triton.next_power_of_2(dim)
    block = max(1, min(triton.next_power_of_2(heads), 1024 // padded))
    grid = (tokens, triton.cdiv(heads, block))
    if cos is not None and sin is not None and width == dim == padded:
        _norm_rope_whole[grid](
            qk, qk.stride(0), qk.stride(1), qk if weight is None else weight, cos, sin, heads, eps, HEADS=block,
            HALF=dim // 2, NORM=weight is not None, **launch_options(qk.device, 4, 1),
        )  # fmt: skip
        return qk
    _norm_rope[grid](
        qk, qk.stride(0), qk.stride(1), qk if weight is None else weight, qk if cos is None else cos,
        qk if sin is None else sin, heads, eps, HEADS=block, D=dim, DP=padded, R=width, NORM=weight is not None,
        **launch_options(qk.device, 4, 1),
    )  # fmt: skip
    return qk


def rope(qk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _launch(qk, None, 0.0, cos.contiguous(), sin.contiguous())


def qk_norm_rope(qk: Tensor, weight: Tensor, eps: float, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    if cos is None or sin is None:
        return _launch(qk, weight, eps, None, None)
    return _launch(qk, weight, eps, cos.contiguous(), sin.contiguous())
