"""How 4-bit weights lie in a GPU's memory: as the tensor cores' operands are held in registers (triton_codes.py).

A tile is 16 rows and 128 columns, two chunks of 64 for a warp of 32 lanes (g, t), g below 8 and t below 4. In each
chunk a lane has four 32-bit words i, next to one another in memory, of rows g and g + 8 and 16 columns: column
16 t + 4 i + 2 a + b for FP4, so that a lane meets one scale a row; 32 (i // 2) + 8 t + 4 (i % 2) + 2 a + b for
integers, so that 32 columns are always half a chunk. Of one word, b is its half and (a, row) the quarter of the half.

Integers lie in fours of bits, the first quarter lowest. The bits of E2M1 lie where a bfloat16 has its sign, the end of
its exponent and the first of its mantissa (15, 8, 7, 6), three bits lower for each further quarter; the last takes what
is left (14, 13, 11, 10). Rows are padded to 16, columns to 128.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "COLUMNS",
    "ROWS",
    "decode_e5m3",
    "encode_e5m3",
    "tile_codes",
    "tile_factors",
    "tile_scales",
    "untile_codes",
    "untile_factors",
    "untile_scales",
]

ROWS, COLUMNS = 16, 128
_BIAS = 13
# Of each quarter, where the bits of a code go, the lowest first.
_INTEGER = tuple(tuple(range(4 * i, 4 * i + 4)) for i in range(4))
_E2M1 = ((6, 7, 8, 15), (3, 4, 5, 12), (0, 1, 2, 9), (10, 11, 13, 14))
# Codes of (tile, h, g, chunk, parts of a column) in the order (tile, chunk, g, t, i, a, h, b), and back.
_FP4_PARTS, _INTEGER_PARTS = (4, 4, 2, 2), (2, 4, 2, 2, 2)
_FP4_ORDER, _INTEGER_ORDER = (0, 3, 2, 4, 5, 6, 1, 7), (0, 3, 2, 5, 4, 6, 7, 1, 8)


def tile_codes(codes: Tensor, *, fp4: bool) -> Tensor:
    """uint8 [N, K] with values below 16 -> int32 [tiles of rows, 64-column chunks, 128]."""
    padded = F.pad(codes, (0, -codes.shape[1] % COLUMNS, 0, -codes.shape[0] % ROWS))
    chunks = padded.shape[1] // 64
    parts, order = (_FP4_PARTS, _FP4_ORDER) if fp4 else (_INTEGER_PARTS, _INTEGER_ORDER)
    lanes = padded.view(-1, 2, 8, chunks, *parts).permute(order).reshape(-1, chunks, 128, 4, 2)
    words = torch.zeros(lanes.shape[:3], dtype=torch.int32, device=codes.device)
    for quarter, places in enumerate(_E2M1 if fp4 else _INTEGER):
        for half in range(2):
            code = lanes[..., quarter, half].to(torch.int32)
            for bit, place in enumerate(places):
                words |= ((code >> bit) & 1) << (place + 16 * half)
    return words


def untile_codes(words: Tensor, rows: int, columns: int, *, fp4: bool) -> Tensor:
    """The codes, uint8 [rows, columns]."""
    tiles, chunks, _ = words.shape
    lanes = torch.zeros(tiles, chunks, 128, 4, 2, dtype=torch.uint8, device=words.device)
    for quarter, places in enumerate(_E2M1 if fp4 else _INTEGER):
        for half in range(2):
            for bit, place in enumerate(places):
                lanes[..., quarter, half] |= (((words >> (place + 16 * half)) & 1) << bit).to(torch.uint8)
    parts, order = (_FP4_PARTS, _FP4_ORDER) if fp4 else (_INTEGER_PARTS, _INTEGER_ORDER)
    straight = (tiles, 2, 8, chunks, *parts)
    back = [order.index(i) for i in range(len(order))]
    codes = lanes.reshape([straight[i] for i in order]).permute(back).reshape(tiles * ROWS, chunks * 64)
    return codes[:rows, :columns].contiguous()


def tile_scales(scale: Tensor, group: int) -> Tensor:
    """Bytes [N, K / group] of 16 or 32 columns -> int32 [tiles of rows, 128-column blocks, 512 / group].

    One word for every (g, columns of a group in a chunk): bytes of the first chunk, rows g and g + 8, then the second.
    """
    per = 64 // group
    blocks = -(-scale.shape[1] // (2 * per))
    padded = F.pad(scale, (0, blocks * 2 * per - scale.shape[1], 0, -scale.shape[0] % ROWS))
    lanes = padded.view(-1, 2, 8, blocks, 2, per).permute(0, 3, 2, 5, 4, 1).contiguous()
    return lanes.flatten().view(torch.int32).view(-1, blocks, 8 * per)


def untile_scales(words: Tensor, rows: int, groups: int, group: int) -> Tensor:
    """The bytes, uint8 [rows, groups]."""
    tiles, blocks, _ = words.shape
    per = 64 // group
    lanes = words.flatten().view(torch.uint8).view(tiles, blocks, 8, per, 2, 2)
    return lanes.permute(0, 5, 2, 1, 4, 3).reshape(tiles * ROWS, -1)[:rows, :groups].contiguous()


def tile_factors(values: Tensor) -> Tensor:
    """[N, groups] -> [tiles of rows, groups, 16]."""
    padded = F.pad(values, (0, 0, 0, -values.shape[0] % ROWS))
    return padded.view(-1, ROWS, values.shape[1]).transpose(1, 2).contiguous()


def untile_factors(values: Tensor, rows: int) -> Tensor:
    """[rows, groups]."""
    return values.transpose(1, 2).reshape(-1, values.shape[1])[:rows].contiguous()


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
