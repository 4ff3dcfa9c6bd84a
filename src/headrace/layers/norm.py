"""Norms with one interface: alone, or of a sum with the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headrace.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from headrace.layers.linear import parameter

__all__ = ["LayerNorm", "NoNorm", "RMSNorm"]


class NoNorm(nn.Module):
    """Stands where a family has no norm."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """See RMSNorm.add."""
        total = residual + x
        return total, total

    def of_sum(self, x: Tensor, residual: Tensor) -> Tensor:
        """See RMSNorm.of_sum."""
        return residual + x


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich 2019).

    Args:
        plus_one: the checkpoint stores weight - 1 (Gemma). The sum is kept in float32,
            as the model defines it.
    """

    def __init__(
        self, dim: int, eps: float, *, plus_one: bool = False, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.eps = eps
        self.plus_one = plus_one
        self.weight = parameter(dim, dtype=torch.float32 if plus_one else dtype, device=device)

    def finish(self) -> None:
        """Called once, after the weights are loaded."""
        if self.plus_one:
            self.weight.data.add_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(residual + x), residual + x); ``residual`` may be overwritten with the sum."""
        return add_rms_norm(x, residual, self.weight, self.eps)

    def of_sum(self, x: Tensor, residual: Tensor) -> Tensor:
        """norm(residual + x); both may be overwritten."""
        return self.add(x, residual)[0]


class LayerNorm(nn.Module):
    """Layer norm (Ba et al. 2016).

    Args:
        plus_one: the checkpoint stores weight - 1 (Nemotron).
    """

    def __init__(
        self,
        dim: int,
        eps: float,
        *,
        bias: bool = True,
        plus_one: bool = False,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.plus_one = plus_one
        self.weight = parameter(dim, dtype=dtype, device=device)
        self.bias = parameter(dim, dtype=dtype, device=device) if bias else None

    def finish(self) -> None:
        """Called once, after the weights are loaded."""
        if self.plus_one:
            self.weight.data.add_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """See RMSNorm.add."""
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps)

    def of_sum(self, x: Tensor, residual: Tensor) -> Tensor:
        """See RMSNorm.of_sum."""
        return layer_norm(x, self.weight, self.bias, self.eps, residual)
