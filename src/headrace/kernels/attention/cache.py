"""How keys and values get into a cache of another type."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["as_cached", "gather", "store", "take"]

_FP8_MAX = 448.0


def as_cached(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the cache's type; FP8 saturates at 448, where PyTorch's own cast would give NaN.

    NaN stays NaN, so that a broken step is still seen.
    """
    if x.dtype is dtype:
        return x
    return x.clamp(-_FP8_MAX, _FP8_MAX).to(dtype) if dtype is torch.float8_e4m3fn else x.to(dtype)


def store(cache: Tensor, slots: Tensor, x: Tensor) -> None:
    """Write rows x [T, H, D] to ``slots`` int64 [T] of a cache [N, H, D]."""
    x = as_cached(x, cache.dtype)
    if cache.dtype is torch.float8_e4m3fn:  # PyTorch copies FP8 by index only as bytes
        cache, x = cache.view(torch.uint8), x.view(torch.uint8)
    cache.index_copy_(0, slots, x)


def gather(cache: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """Rows ``index`` int64 [R] of a cache [N, H, D] into ``out`` [R, H, D]; returns out."""
    if cache.dtype is torch.float8_e4m3fn:
        torch.index_select(cache.view(torch.uint8), 0, index, out=out.view(torch.uint8))
        return out
    return torch.index_select(cache, 0, index, out=out)


def take(cache: Tensor, index: Tensor) -> Tensor:
    """A fresh tensor of rows ``index`` int64 [R] of a cache [N, ...]."""
    if cache.dtype is torch.float8_e4m3fn:
        return cache.view(torch.uint8)[index].view(torch.float8_e4m3fn)
    return cache[index]
