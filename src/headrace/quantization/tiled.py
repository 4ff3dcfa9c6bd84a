"""4-bit weights as a GPU's kernels take them, and back, exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.kernels.quantized_linear.formats import pack_nibbles, unpack_nibbles
from headrace.kernels.quantized_linear.tiling import (
    decode_e5m3,
    encode_e5m3,
    tile_codes,
    tile_factors,
    tile_scales,
    untile_codes,
    untile_factors,
    untile_scales,
)
from headrace.quantization.schemes.fp4 import MXFP4_GROUP, NVFP4_GROUP, Fp4Weight
from headrace.quantization.schemes.group_int import GroupIntWeight

__all__ = ["TiledWeight", "can_tile", "tile"]

_SYMMETRIC = 8.0
_TWO = 128  # as an E8M0


@dataclass(frozen=True)
class TiledWeight:
    """An Fp4Weight or a 4-bit GroupIntWeight, laid out as kernels/quantized_linear/tiling.py says.

    Attributes:
        words: int32 [tiles of 16 rows, chunks of 64 columns, 128].
        scale: FP4: int32 [tiles, blocks of 128 columns, 512 / group], four bytes each: E5M3 (NVFP4) or exponents;
            integers: float32 [tiles, groups, 16].
        row_scale: float32 [rows], or None for integers.
        zero: bfloat16 ``-128 - zero`` [tiles, groups, 16], or None where all are 8 or there are none.
        small: the scales are exponents, and none is above 2 or NaN: code and scale become bfloat16 by one product.
    """

    words: Tensor
    scale: Tensor
    row_scale: Tensor | None
    zero: Tensor | None
    shape: tuple[int, int]
    group: int
    small: bool = False

    @property
    def fp4(self) -> bool:
        return self.row_scale is not None

    @property
    def nbytes(self) -> int:
        extra = sum(t.nbytes for t in (self.row_scale, self.zero) if t is not None)
        return int(self.words.nbytes + self.scale.nbytes + extra)

    def restore(self) -> Fp4Weight | GroupIntWeight:
        """What was tiled: the same numbers (of zero scales and negative ones, the same products)."""
        rows, columns = self.shape
        codes = untile_codes(self.words, rows, columns, fp4=self.fp4)
        if self.row_scale is None:
            scale = untile_factors(self.scale, rows)
            known = torch.full_like(scale, _SYMMETRIC)
            zero = known if self.zero is None else -128 - untile_factors(self.zero, rows).float()
            return GroupIntWeight(pack_nibbles(codes), scale, zero.contiguous(), 4)
        scale = untile_scales(self.scale, rows, columns // self.group, self.group)
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


def tile(weight: Fp4Weight | GroupIntWeight) -> TiledWeight:
    """Lay a weight out anew, on its device."""
    if isinstance(weight, GroupIntWeight):
        assert can_tile(weight), weight.group
        words = tile_codes(unpack_nibbles(weight.codes), fp4=False)
        symmetric = bool((weight.zero == _SYMMETRIC).all())
        zero = None if symmetric else tile_factors((-128 - weight.zero).bfloat16())
        return TiledWeight(words, tile_factors(weight.scale), None, zero, weight.shape, weight.group)
    codes, scale = unpack_nibbles(weight.packed), weight.scale
    if weight.group == NVFP4_GROUP:
        codes, scale = _positive(codes, scale)
    small = weight.group == MXFP4_GROUP and bool((scale <= _TWO).all())
    words, tiled = tile_codes(codes, fp4=True), tile_scales(scale, weight.group)
    return TiledWeight(words, tiled, weight.row_scale, None, weight.shape, weight.group, small)


def _positive(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The same products with E5M3 scales: signs move to the codes, and where the scale is zero so are they."""
    values = scale.float()
    sign = (torch.signbit(values).to(torch.uint8) << 3).repeat_interleave(NVFP4_GROUP, 1)
    nothing = (values == 0).repeat_interleave(NVFP4_GROUP, 1)
    codes = torch.where(nothing, codes & 8, codes) ^ sign
    magnitude = torch.where(values == 0, 1.0, values.abs()).to(torch.float8_e4m3fn)
    return codes, encode_e5m3(magnitude)


assert MXFP4_GROUP == 32
