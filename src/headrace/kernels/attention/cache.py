"""How keys and values get into a cache of another type."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.attention import fp4

__all__ = ["as_cached", "cache_width", "gather", "readable", "store", "take"]

_FP8_MAX = 448.0
_AS_BYTES = (torch.float8_e4m3fn, fp4.FP4)  # PyTorch copies these by index only as bytes


def cache_width(dim: int, dtype: torch.dtype) -> int:
    """Elements of ``dtype`` that a head's ``dim`` numbers take in a cache."""
    return fp4.row_bytes(dim) if dtype is fp4.FP4 else dim


def as_cached(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the cache's type; FP8 saturates at 448, where PyTorch's own cast would give NaN.

    NaN stays NaN, so that a broken step is still seen.
    """
    if x.dtype is dtype:
        return x
    if dtype is fp4.FP4:
        return fp4.encode(x).view(dtype)
    return x.clamp(-_FP8_MAX, _FP8_MAX).to(dtype) if dtype is torch.float8_e4m3fn else x.to(dtype)


def store(cache: Tensor, slots: Tensor, x: Tensor) -> None:
    """Write rows x [T, H, D] to ``slots`` int64 [T] of a cache [N, H, D] (of FP4: [N, H, row_bytes(D)])."""
    x = as_cached(x, cache.dtype)
    if cache.dtype in _AS_BYTES:
        cache, x = cache.view(torch.uint8), x.view(torch.uint8)
    cache.index_copy_(0, slots, x)


def gather(cache: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """Rows ``index`` int64 [R] of a cache [N, H, D] into ``out`` [R, H, D]; returns out."""
    if cache.dtype in _AS_BYTES:
        torch.index_select(cache.view(torch.uint8), 0, index, out=out.view(torch.uint8))
        return out
    return torch.index_select(cache, 0, index, out=out)


def take(cache: Tensor, index: Tensor) -> Tensor:
    """A fresh tensor of rows ``index`` int64 [R] of a cache [N, ...]."""
    if cache.dtype in _AS_BYTES:
        return cache.view(torch.uint8)[index].view(cache.dtype)
    return cache[index]


def readable(rows: Tensor) -> Tensor:
    """Rows of a cache as numbers: those of an FP4 cache decoded, others as they are."""
    return fp4.decode(rows.view(torch.uint8)) if rows.dtype is fp4.FP4 else rows
