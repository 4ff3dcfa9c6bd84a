"""Rounding in which later columns make up for the errors of earlier ones (Frantar et al. 2023, GPTQ).

The error that counts is that of the product: ``sum over rows of ((round(W) - W) G (round(W) - W)^T)`` for inputs X with
``G = X^T X``. Columns are rounded one after another, those with the largest inputs first, and what each lost is taken
from the columns still to come, in the proportion that changes the product least. Scales are chosen before, as without
compensation, so that any format with scales takes part.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headrace.kernels.quantized_linear.formats import encode_e2m1, pack_nibbles, to_fp8
from headrace.quantization.scaled import QuantizedWeight
from headrace.quantization.schemes.fp4 import Fp4Weight
from headrace.quantization.schemes.fp8 import Fp8Weight
from headrace.quantization.schemes.group_int import GroupIntWeight
from headrace.quantization.writing import round_weight

__all__ = ["Compensation"]

_DAMPING = (
    0.1  # of the mean of G's diagonal, added to it: other texts than those of calibration must do well, too
)
_BLOCK = 128  # columns after which the rest of the matrix is brought up to date
# Bits -> how far a weight may be moved, of its own size: columns that see small inputs would go anywhere, and do harm
# where they see large ones. Pieces of 64 columns stay within the limits of quantization/audit.py.
_FREEDOM = {4: 0.15, 8: 0.08}
_PIECE = 64
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Compensation:
    """How to round matrices that meet the same inputs.

    Args:
        gram: mean of x^T x, float32 [columns, columns]; work is done on its device.
    """

    def __init__(self, gram: Tensor) -> None:
        self.importance = gram.diagonal()
        self.order = self.importance.argsort(descending=True)
        self.factor = _inverse_factor(gram[self.order][:, self.order])

    def round(self, weight: Tensor, form: str) -> QuantizedWeight:
        """A matrix [rows, columns] in a format of writing.WRITABLE.

        Raises UnsupportedCheckpoint when the matrix' shape forbids the format.
        """
        weight = weight.to(self.factor.device).float()
        plain = round_weight(weight, form, self.importance)
        steps = _steps(plain)[:, self.order]
        bound = _FREEDOM[_bits(plain)] * _sizes(weight)
        values = self._values(weight[:, self.order], steps, bound[:, self.order], _nearest(plain))
        return _with_values(plain, values[:, self.order.argsort()])

    def _values(
        self, weight: Tensor, steps: Tensor, bound: Tensor, nearest: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Values of the format, float32 [rows, columns], still to be multiplied with ``steps``; spoils ``weight``.

        Args:
            bound: how far compensation may move each weight.
        """
        values, columns, factor = torch.empty_like(weight), weight.shape[1], self.factor
        low, high = weight - bound, weight + bound
        for start in range(0, columns, _BLOCK):
            stop = min(start + _BLOCK, columns)
            errors = torch.empty_like(weight[:, start:stop])
            for at in range(start, stop):
                wanted = torch.clamp(weight[:, at], low[:, at], high[:, at])
                values[:, at] = nearest(wanted / steps[:, at])
                error = (weight[:, at] - values[:, at] * steps[:, at]) / factor[at, at]
                errors[:, at - start] = error
                weight[:, at + 1 : stop].addr_(error, factor[at, at + 1 : stop], alpha=-1)
            weight[:, stop:] -= errors @ factor[start:stop, stop:]
        return values


def _inverse_factor(gram: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse, float32."""
    damped = gram.double()
    mean = damped.diagonal().mean().clamp(min=1e-30)
    damped.diagonal().add_(_DAMPING * mean)
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    return factor.float()


def _sizes(weight: Tensor) -> Tensor:
    """Of each weight: its magnitude, or what its piece or (a quarter of) its row has on average, if that is more."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % _PIECE)).view(rows, -1, _PIECE)
    piece = padded.square().mean(-1).sqrt().repeat_interleave(_PIECE, 1)[:, :columns]
    row = weight.square().mean(1, keepdim=True).sqrt() / 4
    return torch.maximum(weight.abs(), torch.maximum(piece, row))


def _bits(weight: QuantizedWeight) -> int:
    return (
        8 if isinstance(weight, Fp8Weight) or (isinstance(weight, GroupIntWeight) and weight.bits == 8) else 4
    )


def _steps(weight: QuantizedWeight) -> Tensor:
    """What each value is multiplied with, float32 [rows, columns], nowhere zero."""
    match weight:
        case Fp8Weight():
            found = weight.row_scales().repeat_interleave(weight.block[1], 1)[:, : weight.shape[1]]
        case Fp4Weight():
            found = weight.scales().repeat_interleave(weight.group, 1)
        case GroupIntWeight():
            found = weight.scale.repeat_interleave(weight.group, 1)
    return torch.where(found == 0, 1.0, found)


def _nearest(weight: QuantizedWeight) -> Callable[[Tensor], Tensor]:
    """float32 -> the nearest value of the format."""
    match weight:
        case Fp8Weight():
            return lambda x: to_fp8(x).float()
        case Fp4Weight():
            grid = torch.tensor(_E2M1, device=weight.packed.device)
            middle = (grid[1:] + grid[:-1]) / 2
            return lambda x: grid[torch.bucketize(x.abs(), middle)] * x.sign()
        case GroupIntWeight():
            high = 2 ** (weight.bits - 1) - 1
            low = -high if weight.bits == 8 else -high - 1
            return lambda x: x.round().clamp(low, high)


def _with_values(weight: QuantizedWeight, values: Tensor) -> QuantizedWeight:
    """Other values under the same scales."""
    match weight:
        case Fp8Weight():
            return Fp8Weight(to_fp8(values), weight.scale, weight.block)
        case Fp4Weight():
            return Fp4Weight(encode_e2m1(values), weight.scale, weight.row_scale)
        case GroupIntWeight():
            codes = (values + weight.zero.repeat_interleave(weight.group, 1)).to(torch.uint8)
            packed = pack_nibbles(codes) if weight.bits == 4 else codes
            return GroupIntWeight(packed, weight.scale, weight.zero, weight.bits)
