"""Norms in as few torch operations as possible."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.kernels.norm import reference

__all__ = ["add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm"]


@functools.cache
def _root(eps: float) -> Tensor:
    return torch.tensor(eps).sqrt_()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if weight.dtype != x.dtype:
        return reference.rms_norm(x, weight, eps)
    if x.dtype == torch.float32:
        # sqrt(mean(x^2) + eps) = hypot(|x| / sqrt(D), sqrt(eps)): half the time of F.rms_norm on a few rows.
        length = torch.linalg.vector_norm(x, 2, -1, True).mul_(x.shape[-1] ** -0.5)
        return (x * weight).div_(length.hypot_(_root(eps)))
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    residual.add_(x)
    return rms_norm(residual, weight, eps), residual


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> Tensor:
    if residual is not None:
        x = x.add_(residual)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    residual.add_(x)
    return layer_norm(residual, weight, bias, eps), residual
