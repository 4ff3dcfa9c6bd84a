"""4-bit weights as a GPU's kernels take them, and back, exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.kernels.quantized_linear.formats import pack_nibbles, unpack_nibbles
from headrace.kernels.quantized_linear.tiling import decode_e5m3, encode_e5m3, tile_codes, untile_codes
from headrace.quantization.schemes.fp4 import MXFP4_GROUP, NVFP4_GROUP, Fp4Weight
from headrace.quantization.schemes.group_int import GroupIntWeight

__all__ = ["TiledWeight", "can_tile", "tile"]

_SYMMETRIC = 8.0


@dataclass(frozen=True)
class TiledWeight:
    """An Fp4Weight or a 4-bit GroupIntWeight.

    Attributes:
        words: int16 [rows, padded columns / 4], see kernels/quantized_linear/tiling.py.
        scale: NVFP4: uint8 E5M3 [rows, padded columns / 16]; MXFP4: uint8 exponents [rows, padded columns / 32];
            integers: float32 [groups, rows].
        row_scale: float32 [rows], or None for integers.
        zero: bfloat16 ``-128 - zero`` [groups, rows], or None where all are 8 or there are none.
    """

    words: Tensor
    scale: Tensor
    row_scale: Tensor | None
    zero: Tensor | None
    shape: tuple[int, int]
    group: int
    quarter: int

    @property
    def fp4(self) -> bool:
        return self.row_scale is not None

    @property
    def nbytes(self) -> int:
        extra = sum(t.nbytes for t in (self.row_scale, self.zero) if t is not None)
        return int(self.words.nbytes + self.scale.nbytes + extra)

    def restore(self) -> Fp4Weight | GroupIntWeight:
        """What was tiled: the same numbers (of zero scales and negative ones, the same products)."""
        columns = self.shape[1]
        codes = untile_codes(self.words, self.quarter, columns, fp4=self.fp4)
        if self.row_scale is None:
            scale = self.scale.t().contiguous()
            zero = torch.full_like(scale, _SYMMETRIC) if self.zero is None else -128 - self.zero.t().float()
            return GroupIntWeight(pack_nibbles(codes), scale, zero.contiguous(), 4)
        scale = self.scale[:, : columns // self.group].contiguous()
        if self.group == NVFP4_GROUP:
            scale = decode_e5m3(scale).to(torch.float8_e4m3fn)
        return Fp4Weight(pack_nibbles(codes), scale, self.row_scale)


def can_tile(weight: object) -> bool:
    """Whether ``tile`` takes it."""
    if isinstance(weight, Fp4Weight):
        return True
    return (
        isinstance(weight, GroupIntWeight)
        and weight.bits == 4
        and weight.order is None
        and weight.group % 32 == 0
    )


def tile(weight: Fp4Weight | GroupIntWeight, quarter: int | None = None) -> TiledWeight:
    """Lay a weight out anew, on its device.

    Args:
        quarter: columns of a quarter of a tile; None: by what the weight's shape and groups allow.
    """
    rows, columns = weight.shape
    if isinstance(weight, GroupIntWeight):
        quarter = quarter or (64 if weight.group % 64 == 0 and columns % 256 == 0 else 32)
        assert can_tile(weight) and weight.group % quarter == 0, (weight.group, quarter)
        words = tile_codes(unpack_nibbles(weight.codes), quarter, fp4=False)
        zero = None if bool((weight.zero == _SYMMETRIC).all()) else (-128 - weight.zero).t().bfloat16()
        zero = None if zero is None else zero.contiguous()
        return TiledWeight(
            words, weight.scale.t().contiguous(), None, zero, (rows, columns), weight.group, quarter
        )
    quarter = quarter or (64 if columns % 256 == 0 else 32)
    codes, scale = unpack_nibbles(weight.packed), weight.scale
    if weight.group == NVFP4_GROUP:
        codes, scale = _positive(codes, scale)
    padding = -columns % (4 * quarter) // weight.group
    scale = F.pad(scale, (0, padding), value=127)
    return TiledWeight(
        tile_codes(codes, quarter, fp4=True),
        scale,
        weight.row_scale,
        None,
        (rows, columns),
        weight.group,
        quarter,
    )


def _positive(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The same products with E5M3 scales: signs move to the codes, and where the scale is zero so are they."""
    values = scale.float()
    sign = (torch.signbit(values).to(torch.uint8) << 3).repeat_interleave(NVFP4_GROUP, 1)
    nothing = (values == 0).repeat_interleave(NVFP4_GROUP, 1)
    codes = torch.where(nothing, codes & 8, codes) ^ sign
    magnitude = torch.where(values == 0, 1.0, values.abs()).to(torch.float8_e4m3fn)
    return codes, encode_e5m3(magnitude)


assert MXFP4_GROUP == 32
