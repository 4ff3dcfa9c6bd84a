"""A linear map with its activation, packed once for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.dense import dense, pack
from headrace.layers.linear import Linear

__all__ = ["Dense"]


class Dense(Linear):
    """``activation(x @ weight.T + bias)``: `Linear` for models that run once over each token.

    Args:
        activation: a word of kernels.dense, or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        parts: tuple[int, ...] | None = None,
        activation: str | None = None,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, parts=parts, dtype=dtype, device=device)
        self.activation = activation
        self._packed: Tensor | None = None

    def finish(self) -> None:
        """Called once, when the weights are there; drops the unpacked ones where the packed are a copy."""
        if self._packed is None:
            given = self.weight.data  # each access makes another tensor of the same memory
            self._packed = pack(given)
            if self._packed is not given:
                self.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        assert self._packed is not None, "finish() was not called"
        return dense(x, self._packed, self.bias, self.activation)

    @property
    def packed_bytes(self) -> int:
        """Of the packed weight, where it took the place of the parameter."""
        packed = None if self.weight.numel() else self._packed
        return 0 if packed is None else packed.numel() * packed.element_size()

    def unpacked(self) -> Tensor:
        """The weight [out, in], also after finish()."""
        return self.weight if self.weight.numel() or self._packed is None else self._packed.to_dense()
