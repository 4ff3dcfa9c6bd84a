"""Rotary embedding, plainly: each pair (x[i], x[i + R/2]) turns by its angle."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["norm_rope_store", "qk_norm_rope", "rope"]


def rope(qk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = cos.shape[-1]
    half = width // 2
    cosine, sine = cos[..., :half], sin[..., half:]
    first, second = qk[..., :half].float(), qk[..., half:width].float()
    turned = (first * cosine - second * sine, second * cosine + first * sine, qk[..., width:].float())
    return torch.cat(turned, dim=-1).to(qk.dtype)


def qk_norm_rope(qk: Tensor, weight: Tensor, eps: float, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    x = qk.float()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()
    normed = normed.to(qk.dtype)
    return normed if cos is None or sin is None else rope(normed, cos, sin)


def norm_rope_store(*_: object) -> bool:
    return False
