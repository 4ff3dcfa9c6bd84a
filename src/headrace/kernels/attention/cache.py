"""How keys and values get into a cache of another type."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["as_cached"]

_FP8_MAX = 448.0


def as_cached(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the cache's type; FP8 saturates at 448, where PyTorch's own cast would give NaN.

    NaN stays NaN, so that a broken step is still seen.
    """
    if x.dtype is dtype:
        return x
    return x.clamp(-_FP8_MAX, _FP8_MAX).to(dtype) if dtype is torch.float8_e4m3fn else x.to(dtype)
