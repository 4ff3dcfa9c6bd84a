"""A linear over any weight that carries its own scales, with or without rounded activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headrace.kernels.quantized_linear import round_activations
from headrace.kernels.rounding import Rounded
from headrace.quantization.native_fp4 import NativeFp4Weight, can_multiply, native, round_rows
from headrace.quantization.schemes.fp4 import Fp4Weight
from headrace.quantization.schemes.fp8 import Fp8Weight
from headrace.quantization.schemes.group_int import GroupIntWeight
from headrace.quantization.tiled import TiledWeight, can_tile, tile

__all__ = ["Activations", "QuantizedWeight", "ScaledLinear", "joined_linear"]

_CHUNK_ELEMENTS = 1 << 22  # of float32 weights that live at once

QuantizedWeight = Fp8Weight | Fp4Weight | GroupIntWeight


@dataclass(frozen=True)
class Activations:
    """How the input of a linear is rounded before the product.

    Attributes:
        kind: ``none`` (16 bits, weight-only), ``token`` (FP8, a scale a row, computed as it comes), ``group`` (FP8,
            a scale for each 128 columns of a row), ``static`` (FP8, one calibrated scale) or ``nvfp4`` (a scale for 16
            columns and one a row, where the device multiplies NVFP4; elsewhere ``to`` makes it ``none``).
        scale: float32 scalar, for ``static``.
    """

    kind: Literal["none", "token", "group", "static", "nvfp4"] = "none"
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        assert (self.kind == "static") == (self.scale is not None)

    def to(self, device: torch.device) -> Activations:
        if self.kind == "nvfp4" and not can_multiply(device):
            return Activations()
        return Activations(self.kind, None if self.scale is None else self.scale.to(device))

    def rounded(self, x: Tensor) -> Tensor:
        """[M, K] as the product sees it, float32."""
        if self.kind == "none":
            return x.float()
        if self.kind == "nvfp4":
            return round_rows(x).dequantize()
        return round_activations(x, group=128 if self.kind == "group" else None, scale=self.scale)


class ScaledLinear(nn.Module):
    """``round(x) @ weight.T + bias``, rounded once to the type of x.

    Plain attributes, not parameters: no cast of the model may reach into the packing.

    Args:
        weight: [out, in], on the device where it will be used.
        bias: [out] or None.
        parts: rows of each projection fused into this one, in order.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        *,
        bias: Tensor | None = None,
        parts: tuple[int, ...] | None = None,
        activations: Activations = Activations(),
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.parts = parts or (self.out_features,)
        assert sum(self.parts) == self.out_features
        self.activations, self.bias = activations, bias
        self.row_scale: Tensor | None = None  # kept by quantization/device.py
        self._on_gpu = _device(weight).type == "cuda"
        self.held: QuantizedWeight | TiledWeight | NativeFp4Weight = weight
        if self._on_gpu:
            self.hold(weight)

    def hold(self, weight: QuantizedWeight) -> None:
        """Keep the weight as a GPU's products read it; activations that no product rounds stay in 16 bits."""
        self.held = weight
        if self.activations.kind == "nvfp4":
            laid_out = native(weight)
            if laid_out is not None:
                self.held = laid_out
                return
            self.activations = Activations()
        if not isinstance(weight, Fp8Weight) and can_tile(weight):
            self.held = tile(weight)

    def takes_rounded(self, x: Tensor) -> bool:
        """Whether forward rounds rows like x [T, *] to FP8 with a scale each, and takes them so."""
        if not self._on_gpu or x.dim() != 2:
            return False
        from headrace.quantization.device import takes_rounded

        return takes_rounded(self, x)

    def forward(self, x: Tensor | Rounded) -> Tensor:
        """[..., in] -> [..., out], in the type of x; of rounded rows [T, in] in bfloat16."""
        if isinstance(x, Rounded):
            from headrace.quantization.device import rounded_product

            return rounded_product(self, x)
        rows = x.reshape(-1, self.in_features)
        if self._on_gpu:
            from headrace.quantization.device import product  # only here: it needs Triton

            return product(self, rows).view(*x.shape[:-1], self.out_features)
        out = self._reference(rows)
        if self.bias is not None:
            out = out + self.bias
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _reference(self, rows: Tensor) -> Tensor:
        """float32 [M, out] from dequantized weights, a few rows of them at a time."""
        x = self.activations.rounded(rows)
        step = max(_CHUNK_ELEMENTS // self.in_features // 128, 1) * 128
        weight = self.quantized
        if self.out_features <= step:
            return F.linear(x, weight.dequantize())
        starts = range(0, self.out_features, step)
        return torch.cat([F.linear(x, weight.rows(at, at + step).dequantize()) for at in starts], dim=1)

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight; made anew from what is held, where that is laid out for a GPU."""
        return self.held.restore() if isinstance(self.held, (TiledWeight, NativeFp4Weight)) else self.held

    @quantized.setter
    def quantized(self, weight: QuantizedWeight) -> None:
        self.held = weight

    def dequantize(self) -> Tensor:
        """The weights that forward multiplies with, float32 [out, in]."""
        return self.quantized.dequantize()

    @property
    def nbytes(self) -> int:
        """Memory held by the weights."""
        return self.held.nbytes


def _device(weight: QuantizedWeight) -> torch.device:
    return weight.packed.device if isinstance(weight, Fp4Weight) else weight.codes.device


def joined_linear(
    weights: Sequence[QuantizedWeight],
    *,
    bias: Tensor | None,
    activations: Sequence[Activations],
    build: Callable[..., ScaledLinear] = ScaledLinear,
) -> ScaledLinear | None:
    """One linear over projections of the same input, or None where their formats do not go together.

    A static scale of the joint input is the largest of the parts'.

    Args:
        build: makes it, with the arguments of ScaledLinear.
    """
    first = weights[0]
    same_kind = all(type(weight) is type(first) for weight in weights)
    if not same_kind or len({part.kind for part in activations}) != 1:
        return None
    joined: QuantizedWeight
    if isinstance(first, Fp8Weight):
        fp8 = [weight for weight in weights if isinstance(weight, Fp8Weight)]
        if len({weight.block[1] for weight in fp8}) != 1:
            return None
        joined = Fp8Weight.joined(fp8)
    elif isinstance(first, Fp4Weight):
        fp4 = [weight for weight in weights if isinstance(weight, Fp4Weight)]
        if len({weight.group for weight in fp4}) != 1:
            return None
        joined = Fp4Weight.joined(fp4)
    else:
        ints = [weight for weight in weights if isinstance(weight, GroupIntWeight)]
        if not all(first.joins(weight) for weight in ints):
            return None
        joined = GroupIntWeight.joined(ints)
    scales = [part.scale for part in activations if part.scale is not None]
    together = Activations(activations[0].kind, torch.stack(scales).max() if scales else None)
    return build(joined, bias=bias, parts=tuple(weight.shape[0] for weight in weights), activations=together)
