"""Rotary embedding in three torch operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.kernels.norm.cpu import rms_norm

__all__ = ["qk_norm_rope", "rope"]


def rope(qk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = cos.shape[-1]
    if width != qk.shape[-1]:
        part = qk[..., :width]
        part.copy_(rope(part, cos, sin))
        return qk
    # cos and sin are float32, so that low precision rounds once, at the end.
    turned = (qk * cos).addcmul_(qk.roll(width // 2, -1), sin)
    return turned if turned.dtype == qk.dtype else turned.to(qk.dtype)


def qk_norm_rope(qk: Tensor, weight: Tensor, eps: float, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    if qk.dtype == weight.dtype == torch.float32:
        normed = rms_norm(qk, weight, eps)
    else:
        normed = (F.rms_norm(qk, qk.shape[-1:], None, eps) * weight).to(qk.dtype)
    return normed if cos is None or sin is None else rope(normed, cos, sin)
