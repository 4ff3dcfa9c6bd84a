"""NVFP4 on GPUs that multiply it (Blackwell, compute capability 10.0 and later): PyTorch's public scaled product.

Both operands are E2M1 with an E4M3 scale for 16 columns, the scales in the tiles of 128 rows by 4 that cuBLAS reads
(its documentation's "1D Block Scaling Factors Layout"). PyTorch's product of MXFP4 needs another library on NVIDIA's
GPUs; those weights are decoded in registers as on Hopper.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.kernels.quantized_linear.formats import FP4_MAX, FP8_MAX, decode_e2m1, encode_e2m1, to_fp8
from headrace.quantization.schemes.fp4 import NVFP4_GROUP, Fp4Weight

__all__ = [
    "NativeFp4Weight",
    "RoundedRows",
    "block_scales",
    "can_multiply",
    "native",
    "native_product",
    "round_rows",
    "unblock_scales",
]

_TALL, _WIDE = 128, 4  # a tile of scales


@functools.cache
def can_multiply(device: torch.device) -> bool:
    """Whether the device multiplies NVFP4 by NVFP4."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (10, 0)


def block_scales(scale: Tensor) -> Tensor:
    """float8_e4m3fn [rows, groups] -> [padded rows * padded groups], tile by tile, padded with zeros.

    Tiles of 128 rows and 4 groups lie row-major, 512 scales each; in one, row r and group c are at
    ``16 (r % 32) + 4 (r // 32) + c``.
    """
    rows, groups = scale.shape
    raw = F.pad(scale.view(torch.uint8), (0, -groups % _WIDE, 0, -rows % _TALL))
    tiles = raw.view(raw.shape[0] // _TALL, 4, 32, raw.shape[1] // _WIDE, _WIDE)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1).view(torch.float8_e4m3fn)


def unblock_scales(blocked: Tensor, rows: int, groups: int) -> Tensor:
    """The scales again, float8_e4m3fn [rows, groups]."""
    high, wide = -(-rows // _TALL), -(-groups // _WIDE)
    tiles = blocked.view(torch.uint8).view(high, wide, 32, 4, _WIDE).permute(0, 3, 2, 1, 4)
    return tiles.reshape(high * _TALL, wide * _WIDE)[:rows, :groups].contiguous().view(torch.float8_e4m3fn)


@dataclass(frozen=True)
class NativeFp4Weight:
    """An NVFP4 weight as the product takes it.

    Attributes:
        packed: uint8 [rows, columns / 2], as Fp4Weight's.
        scale: float8_e4m3fn, as block_scales lays it out.
        row_scale: float32 [rows].
    """

    packed: Tensor
    scale: Tensor
    row_scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], self.packed.shape[1] * 2

    @property
    def nbytes(self) -> int:
        return int(self.packed.nbytes + self.scale.nbytes + self.row_scale.nbytes)

    def restore(self) -> Fp4Weight:
        """What was laid out, exactly."""
        rows, columns = self.shape
        return Fp4Weight(
            self.packed, unblock_scales(self.scale, rows, columns // NVFP4_GROUP), self.row_scale
        )


def native(weight: object) -> NativeFp4Weight | None:
    """The weight laid out anew, or None where the product does not take its format or shape."""
    if not isinstance(weight, Fp4Weight) or weight.group != NVFP4_GROUP:
        return None
    rows, columns = weight.shape
    if rows % 16 or columns % 32:
        return None
    return NativeFp4Weight(weight.packed.contiguous(), block_scales(weight.scale), weight.row_scale)


@dataclass(frozen=True)
class RoundedRows:
    """Rows rounded to NVFP4: ``e2m1 * scale * row_scale``.

    Attributes:
        packed: uint8 [M, K / 2].
        scale: float8_e4m3fn [M, K / 16].
        row_scale: float32 [M, 1]: the largest of a row is the largest number of the format, whoever else is in the
            batch.
    """

    packed: Tensor
    scale: Tensor
    row_scale: Tensor

    def dequantize(self) -> Tensor:
        """float32 [M, K]."""
        values = decode_e2m1(self.packed).unflatten(1, (-1, NVFP4_GROUP)) * self.scale.float()[..., None]
        dense: Tensor = values.flatten(1) * self.row_scale
        return dense


def round_rows(x: Tensor) -> RoundedRows:
    """Round activations [M, K] (K a multiple of 16) to nearest; NaN and infinities make their whole row NaN."""
    groups = x.float().unflatten(1, (-1, NVFP4_GROUP))
    peak = groups.abs().amax(-1)
    top = peak.amax(-1, keepdim=True)
    row_scale = torch.where(top == 0, 1.0, top / (FP4_MAX * FP8_MAX))
    scale = to_fp8((peak / FP4_MAX / row_scale).nan_to_num(0.0).clamp(min=2.0**-9))
    codes = encode_e2m1(groups / (scale.float() * row_scale)[..., None])
    row_scale = torch.where(torch.isfinite(top), row_scale, torch.nan)
    return RoundedRows(codes.flatten(1), scale, row_scale)


def native_product(x: Tensor, weight: NativeFp4Weight) -> Tensor:
    """``round(x) @ weight.T``, float32 [M, N] of x [M, K]."""
    rounded = round_rows(x)
    recipe, swizzle = F.ScalingType.BlockWise1x16, F.SwizzleType.SWIZZLE_32_4_4
    out = F.scaled_mm(
        rounded.packed.view(torch.float4_e2m1fn_x2),
        weight.packed.view(torch.float4_e2m1fn_x2).t(),
        block_scales(rounded.scale),
        recipe,
        weight.scale,
        recipe,
        swizzle_a=swizzle,
        swizzle_b=swizzle,
        output_dtype=torch.float32,
    )
    return out * rounded.row_scale * weight.row_scale
