"""How 4-bit weights lie in a GPU's memory: in tiles that the kernel reads without interleaving (triton_codes.py).

A tile is 4 Q columns of a row, as Q 16-bit numbers: number j holds columns j, j + Q, j + 2 Q and j + 3 Q. Integers lie
there in fours of bits, the first lowest. The bits of E2M1 lie where a bfloat16 has its sign, the end of its exponent
and the first of its mantissa (15, 8, 7, 6), three bits lower for each further quarter; the last takes what is left
(14, 13, 11, 10). Columns are padded to whole tiles with zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["decode_e5m3", "encode_e5m3", "tile_codes", "untile_codes"]

_BIAS = 13
# Of each quarter, where the bits of a code go, the lowest first.
_INTEGER = tuple(tuple(range(4 * i, 4 * i + 4)) for i in range(4))
_E2M1 = ((6, 7, 8, 15), (3, 4, 5, 12), (0, 1, 2, 9), (10, 11, 13, 14))


def tile_codes(codes: Tensor, quarter: int, *, fp4: bool) -> Tensor:
    """uint8 [N, K] with values below 16 -> int16 [N, ceil(K / 4 Q) Q]."""
    padded = F.pad(codes, (0, -codes.shape[1] % (4 * quarter)))
    parts = padded.view(codes.shape[0], -1, 4, quarter).to(torch.int32)
    words = torch.zeros_like(parts[:, :, 0])
    for i, places in enumerate(_E2M1 if fp4 else _INTEGER):
        for bit, place in enumerate(places):
            words |= ((parts[:, :, i] >> bit) & 1) << place
    return words.flatten(1).to(torch.int16)


def untile_codes(words: Tensor, quarter: int, columns: int, *, fp4: bool) -> Tensor:
    """The codes, uint8 [N, columns]."""
    wide = words.view(words.shape[0], -1, quarter).to(torch.int32)
    parts = torch.zeros(*wide.shape[:2], 4, quarter, dtype=torch.int32, device=words.device)
    for i, places in enumerate(_E2M1 if fp4 else _INTEGER):
        for bit, place in enumerate(places):
            parts[:, :, i] |= ((wide >> place) & 1) << bit
    return parts.flatten(1)[:, :columns].to(torch.uint8).contiguous()


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
