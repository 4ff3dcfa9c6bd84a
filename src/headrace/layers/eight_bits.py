"""Linears over eight-bit weights whose inputs are rounded to eight bits where they are made: by the norm before."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from headrace.kernels import rounding
from headrace.kernels.rounding import Bound, Format, Rounded
from headrace.layers.norm import LayerNorm, RMSNorm

__all__ = ["EightBitLinear", "PlainNorm", "RoundingGate", "RoundingNorm"]

_PIECE = 512  # rows of a weight that are in 32 bits at once
# A bound over the root mean square of independent inputs; those of packaged models are 30 to 80. Averaged by attention,
# numbers may be 30 times smaller still: E4M3 has its three bits down to 1/28,672 of the largest.
_REACH = 512


class EightBitLinear(nn.Module):
    """``activation(x @ weight.T + bias)`` over weights of eight bits with a scale a row.

    Plain attributes, not parameters: no cast of the model may reach into the packing.

    Attributes:
        rounds: the result goes to another one of these, and is rounded for it,
        bound: by one scale if this is known.

    Args:
        weight: [out, in] in 16 or 32 bits.
        bias: [out] or None.
        activation: as `Dense` has it.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        format: Format,
        *,
        parts: tuple[int, ...] | None = None,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.parts = parts or (self.out_features,)
        self.format, self.dtype = format, weight.dtype
        found = rounding.rows(weight.contiguous(), format)
        self.codes, self.scale = found.codes, found.scale.flatten()
        self.bias, self.activation, self.rounds = bias, activation, False
        self.bound: Bound | None = None

    def forward(self, x: Tensor | Rounded) -> Tensor | Rounded:
        """[T, in] -> [T, out]."""
        if isinstance(x, Tensor):
            x = rounding.rows(x, self.format)
        rounds = self.format if self.rounds else None
        return rounding.linear(
            x, self.codes, self.scale, self.bias, self.dtype, self.activation, rounds, self.bound
        )

    def bound_of(self, norm: LayerNorm | RMSNorm, rows: slice = slice(None)) -> Bound | None:
        """The largest magnitude that any of these rows can give for what a norm made, before an activation.

        A norm gives ``gain * n + bias`` with |n| at most the root of its width; rounded to FP8 it is off by a
        sixteenth of itself, and by steps below the smallest number, for which there is 1% more.

        None where it is so far above what is usual that FP8 would lose small numbers.
        """
        shift = norm.bias if isinstance(norm, LayerNorm) else None
        whole = torch.zeros_like(self.scale) if self.bias is None else self.bias
        pieces = zip(*(part[rows].split(_PIECE) for part in (self.codes, self.scale, whole)), strict=True)
        found, usual = [], []
        for codes, scale, bias in pieces:
            weight, still = codes.float() * scale[:, None], bias.float()
            off = moving = (weight * norm.weight.float()).norm(dim=1) * self.in_features**0.5
            if shift is not None:
                still = still + weight @ shift.float()
                off = off + weight.abs() @ shift.float().abs()
            found.append((moving + still.abs() + off / 16).max())
            usual.append(moving.square().mean() / self.in_features)
        limit = 1.01 * float(torch.stack(found).max())
        typical = float(torch.stack(usual).mean()) ** 0.5
        usable = math.isfinite(limit) and 0.0 < limit <= _REACH * typical
        return Bound.of(limit, self.codes.device) if usable else None

    def dequantize(self) -> Tensor:
        """The weights that forward multiplies with, float32 [out, in]."""
        return rounding.values(Rounded(self.codes, self.scale[:, None]))

    @property
    def nbytes(self) -> int:
        """Memory held by the weights."""
        return self.codes.nbytes + self.scale.nbytes


class RoundingNorm(nn.Module):
    """A norm whose result goes to an EightBitLinear; otherwise like LayerNorm and RMSNorm.

    Args:
        full: the result is a residual, too (norms after the sums).
    """

    def __init__(self, norm: LayerNorm | RMSNorm, format: Format, *, full: bool) -> None:
        super().__init__()
        self.norm, self.format, self.full = norm, format, full

    def _run(self, x: Tensor, residual: Tensor | None, keep: bool) -> Rounded:
        norm = self.norm
        layer = isinstance(norm, LayerNorm)
        return rounding.norm(
            x,
            residual,
            norm.weight,
            norm.bias if isinstance(norm, LayerNorm) else None,
            norm.eps,
            self.format,
            layer=layer,
            full=self.full,
            keep=keep,
        )

    def forward(self, x: Tensor) -> Rounded:
        """[T, D] -> [T, D]."""
        return self._run(x, None, False)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Rounded, Tensor]:
        """(norm(residual + x), residual + x); ``residual`` is overwritten with the sum."""
        return self._run(x, residual, True), residual

    def of_sum(self, x: Tensor, residual: Tensor | Rounded) -> Rounded:
        """norm(residual + x)."""
        whole = residual.full if isinstance(residual, Rounded) else residual
        assert whole is not None
        return self._run(x, whole, False)


class PlainNorm(nn.Module):
    """A norm whose input is a sum with a rounded residual, and whose result is read in 16 bits."""

    def __init__(self, norm: LayerNorm | RMSNorm) -> None:
        super().__init__()
        self.norm = norm

    def of_sum(self, x: Tensor, residual: Tensor | Rounded) -> Tensor:
        """norm(residual + x)."""
        whole = residual.full if isinstance(residual, Rounded) else residual
        assert whole is not None
        return self.norm.of_sum(x, whole)


class RoundingGate:
    """``activation(gate) * up`` for an EightBitLinear."""

    def __init__(self, activation: str, format: Format) -> None:
        self.activation, self.format = activation, format

    def __call__(self, gate_up: Tensor) -> Rounded:
        """[T, 2 I] -> [T, I]."""
        return rounding.gate(gate_up, None, self.activation, self.format)
