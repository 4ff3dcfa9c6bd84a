"""What all packed linears share: the signature of layers.linear.Linear over weights of few bits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from headrace.quantization.scaled import ScaledLinear

__all__ = ["JoinedLinear", "PackedLinear"]


class PackedLinear(nn.Module, ABC):
    """``x @ weight.T + bias`` on the CPU in bfloat16 with float32 sums, whatever the type of x.

    The tensors are plain attributes: no cast or move of the model may reach into their packing.

    Args:
        in_features, out_features: of the weight [out, in] that the packing stands for.
        bias: [out] or None.
        parts: rows of each projection fused into this one, in order.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: Tensor | None = None,
        parts: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.parts = parts or (out_features,)
        assert sum(self.parts) == out_features
        self.bias = None if bias is None else bias.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the type of x."""
        rows = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        if rows.dtype is not torch.bfloat16:
            rows = rows.to(torch.bfloat16)
        out = self.product(rows.contiguous())
        if out.shape[1] != self.out_features:
            out = out[:, : self.out_features]
        if self.bias is not None:
            out = out + self.bias
        if x.dtype is not torch.bfloat16:
            out = out.to(x.dtype)
        return out if x.dim() == 2 else out.view(*x.shape[:-1], self.out_features)

    @abstractmethod
    def product(self, rows: Tensor) -> Tensor:
        """bfloat16 [M, in], contiguous -> bfloat16 [M, out or more]; columns past ``out`` are padding."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The weights that forward multiplies with, float32 [out, in]."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory held by the weights."""


class JoinedLinear(nn.Module):
    """Linears over the same input whose outputs lie side by side: parts of one projection in different formats."""

    def __init__(self, linears: Sequence[PackedLinear] | Sequence[ScaledLinear]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)
        self.in_features = linears[0].in_features
        self.out_features = sum(linear.out_features for linear in linears)
        self.parts = tuple(part for linear in linears for part in linear.parts)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return torch.cat([linear(x) for linear in self.linears], dim=-1)

    def dequantize(self) -> Tensor:
        """See PackedLinear.dequantize."""
        return torch.cat([linear.dequantize() for linear in self.linears])  # type: ignore[operator]

    @property
    def nbytes(self) -> int:
        """Memory held by the weights."""
        return sum(linear.nbytes for linear in self.linears)  # type: ignore[misc]
