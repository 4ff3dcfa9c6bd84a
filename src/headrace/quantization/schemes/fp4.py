"""FP4 (E2M1) weights with a scale for every few columns: NVFP4 and MXFP4.

NVFP4: 16 columns share an E4M3 scale, and the matrix one float32 (``row_scale`` here, so that fused projections
keep theirs). MXFP4 (OCP Microscaling Formats 1.0): 32 columns share a power of two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.errors import UnsupportedCheckpoint
from headrace.kernels.quantized_linear.formats import (
    FP4_MAX,
    FP8_MAX,
    decode_e2m1,
    decode_e8m0,
    encode_e2m1,
    encode_e8m0,
    to_fp8,
)

__all__ = ["MXFP4_GROUP", "NVFP4_GROUP", "Fp4Weight", "quantize_mxfp4", "quantize_nvfp4"]

NVFP4_GROUP = 16
MXFP4_GROUP = 32


@dataclass(frozen=True)
class Fp4Weight:
    """``e2m1 * scale * row_scale``.

    Attributes:
        packed: uint8 [rows, columns / 2], the first of two columns in the low half.
        scale: float8_e4m3fn (NVFP4) or uint8 exponents (MXFP4) [rows, columns / group].
        row_scale: float32 [rows]; ones for MXFP4.
    """

    packed: Tensor
    scale: Tensor
    row_scale: Tensor

    def __post_init__(self) -> None:
        assert self.packed.dtype is torch.uint8
        assert self.scale.dtype in (torch.float8_e4m3fn, torch.uint8)
        assert self.packed.shape[1] * 2 == self.scale.shape[1] * self.group, (
            self.packed.shape,
            self.scale.shape,
        )
        assert self.row_scale.shape == self.packed.shape[:1] == self.scale.shape[:1]

    @property
    def group(self) -> int:
        return MXFP4_GROUP if self.scale.dtype is torch.uint8 else NVFP4_GROUP

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], self.packed.shape[1] * 2

    @property
    def nbytes(self) -> int:
        return int(self.packed.nbytes + self.scale.nbytes + self.row_scale.nbytes)

    def dequantize(self) -> Tensor:
        """float32 [rows, columns]. The product of the two scales is rounded once, then that with the value."""
        values: Tensor = decode_e2m1(self.packed).unflatten(1, (-1, self.group)) * self.scales()[..., None]
        return values.flatten(1)

    def scales(self) -> Tensor:
        """Of each group, float32 [rows, columns / group]."""
        scale = decode_e8m0(self.scale) if self.group == MXFP4_GROUP else self.scale.float()
        return scale * self.row_scale[:, None]

    def to(self, device: torch.device) -> Fp4Weight:
        return Fp4Weight(self.packed.to(device), self.scale.to(device), self.row_scale.to(device))

    def rows(self, start: int, stop: int) -> Fp4Weight:
        """Some rows, views."""
        part = slice(start, stop)
        return Fp4Weight(self.packed[part], self.scale[part], self.row_scale[part])

    def reordered(self, order: Tensor) -> Fp4Weight:
        """Rows ``order`` int64 [rows], exact."""
        scale = self.scale.view(torch.uint8)[order].view(self.scale.dtype)
        return Fp4Weight(self.packed[order], scale, self.row_scale[order])

    @staticmethod
    def joined(parts: Sequence[Fp4Weight]) -> Fp4Weight:
        """Rows one after another, exact."""
        if len(parts) == 1:
            return parts[0]
        kind = parts[0].scale.dtype
        scale = torch.cat([part.scale.view(torch.uint8) for part in parts]).view(kind)
        return Fp4Weight(
            torch.cat([part.packed for part in parts]), scale, torch.cat([part.row_scale for part in parts])
        )


def quantize_nvfp4(weight: Tensor, importance: Tensor | None = None, *, matrices: int = 1) -> Fp4Weight:
    """Round 16- or 32-bit weights [rows, columns] to nearest, losing precision.

    The largest scale is E4M3's largest number. Each group takes the better, in squared error, of two scales: its
    largest value at 6 or at 4. Rounding twice changes nothing.

    Args:
        importance: float32 [columns], weight of each column's squared error (the mean square of what it meets in
            calibration); more scales are then tried.
        matrices: how many of equal height lie one after another, each with a scale of its own for all of it.

    Raises UnsupportedCheckpoint when the columns are no multiple of 16.
    """
    grouped = _grouped(weight, NVFP4_GROUP, "nvfp4")
    peak = grouped.abs().amax(-1)
    height = weight.shape[0] // matrices
    top = peak.view(matrices, -1).amax(1).repeat_interleave(height)[:, None]
    whole = torch.where(top > 0, top / (FP4_MAX * FP8_MAX), torch.ones_like(top))  # of each row
    best_error = torch.full_like(peak, torch.inf)
    packed = torch.zeros(*grouped.shape[:2], NVFP4_GROUP // 2, dtype=torch.uint8, device=weight.device)
    codes = torch.zeros(peak.shape, dtype=torch.uint8, device=weight.device)
    weigh = _weigher(importance, NVFP4_GROUP)
    for target in (FP4_MAX, 4.0) if importance is None else (FP4_MAX, 7.0, 6.5, 5.5, 5.0, 4.5, 4.0):
        scale = to_fp8((peak / target / whole).clamp(min=2.0**-9))
        factor = (scale.float() * whole)[..., None]
        trial = encode_e2m1(grouped / factor)
        error = weigh((decode_e2m1(trial) * factor - grouped).square())
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        packed = torch.where(better[..., None], trial, packed)
        codes = torch.where(better, scale.view(torch.uint8), codes)
    return Fp4Weight(packed.flatten(1), codes.view(torch.float8_e4m3fn), whole[:, 0].contiguous())


def quantize_mxfp4(weight: Tensor, importance: Tensor | None = None) -> Fp4Weight:
    """Round 16- or 32-bit weights [rows, columns] to nearest, losing precision.

    The scale is the specification's, the power of two that brings the largest value into [4, 8), or twice that,
    whichever has the less squared error (weighed by ``importance``, as in quantize_nvfp4).

    Raises UnsupportedCheckpoint when the columns are no multiple of 32.
    """
    grouped = _grouped(weight, MXFP4_GROUP, "mxfp4")
    peak = grouped.abs().amax(-1)
    exponent = encode_e8m0(torch.where(peak > 0, peak / 4, 1.0))
    best_error = torch.full_like(peak, torch.inf)
    packed = torch.zeros(*grouped.shape[:2], MXFP4_GROUP // 2, dtype=torch.uint8, device=weight.device)
    scales = exponent
    weigh = _weigher(importance, MXFP4_GROUP)
    for trial_scale in (exponent, exponent + 1):
        factor = decode_e8m0(trial_scale)[..., None]
        trial = encode_e2m1(grouped / factor)
        error = weigh((decode_e2m1(trial) * factor - grouped).square())
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        packed = torch.where(better[..., None], trial, packed)
        scales = torch.where(better, trial_scale, scales)
    return Fp4Weight(packed.flatten(1), scales, torch.ones(weight.shape[0], device=weight.device))


def _weigher(importance: Tensor | None, group: int) -> Callable[[Tensor], Tensor]:
    """Squared errors [rows, groups, group] -> [rows, groups]."""
    if importance is None:
        return lambda squares: squares.sum(-1)
    weights = importance.float().view(1, -1, group)
    return lambda squares: (squares * weights).sum(-1)


def _grouped(weight: Tensor, group: int, scheme: str) -> Tensor:
    if weight.shape[1] % group:
        raise UnsupportedCheckpoint(
            f"{scheme} needs a multiple of {group} columns; this weight is {list(weight.shape)}. "
            "Keep this layer in 16 bits, or use fp8",
            param="quantization",
        )
    grouped: Tensor = weight.float().unflatten(1, (-1, group))
    return grouped
