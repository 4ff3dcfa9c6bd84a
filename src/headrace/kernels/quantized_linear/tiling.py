"""How 4-bit weights lie in a GPU's memory: in tiles that the kernel reads without interleaving (triton_codes.py).

A tile is 4 Q columns of a row, as Q 16-bit numbers: number j holds columns j, j + Q, j + 2 Q and j + 3 Q, the first in
its lowest four bits. Columns are padded to whole tiles with zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["decode_e5m3", "encode_e5m3", "tile_codes", "untile_codes"]

_BIAS = 13


def tile_codes(codes: Tensor, quarter: int) -> Tensor:
    """uint8 [N, K] with values below 16 -> int16 [N, ceil(K / 4 Q) Q]."""
    padded = F.pad(codes, (0, -codes.shape[1] % (4 * quarter)))
    parts = padded.view(codes.shape[0], -1, 4, quarter).to(torch.int32)
    words = parts[:, :, 0] | (parts[:, :, 1] << 4) | (parts[:, :, 2] << 8) | (parts[:, :, 3] << 12)
    return words.flatten(1).to(torch.int16)


def untile_codes(words: Tensor, quarter: int, columns: int) -> Tensor:
    """The codes, uint8 [N, columns]."""
    wide = words.view(words.shape[0], -1, 1, quarter).to(torch.int32)
    shifts = torch.tensor([0, 4, 8, 12], dtype=torch.int32, device=words.device).view(1, 1, 4, 1)
    return ((wide >> shifts) & 15).flatten(1)[:, :columns].to(torch.uint8).contiguous()


def encode_e5m3(scale: Tensor) -> Tensor:
    """float8_e4m3fn above zero (or NaN) -> uint8 of 5 bits of exponent (bias 13) and 3 of mantissa: no subnormals.

    So that a kernel makes a bfloat16 of it with one multiplication and addition of integers. NaN is 255.
    """
    values = scale.float()
    mantissa, exponent = torch.frexp(values)
    code = ((exponent - 1 + _BIAS) << 3) + ((mantissa * 2 - 1) * 8).to(torch.int32)
    return torch.where(torch.isfinite(values), code, 255).to(torch.uint8)


def decode_e5m3(codes: Tensor) -> Tensor:
    """uint8 -> float32."""
    wide = codes.to(torch.int32)
    values = torch.ldexp(1 + (wide & 7) / 8, (wide >> 3) - _BIAS).float()
    return torch.where(codes == 255, torch.nan, values)
