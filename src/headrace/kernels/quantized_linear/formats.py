"""Numbers of few bits: FP8 E4M3, FP4 E2M1, and the scales E8M0 of microscaling formats.

E4M3 is that of Micikevicius et al. 2022 (arXiv 2209.05433), PyTorch's ``float8_e4m3fn``: no infinities, largest
448. E2M1 and E8M0 are those of the OCP Microscaling Formats specification 1.0: E2M1 has no infinity and no NaN,
E8M0 is a bare exponent with bias 127 and NaN as 255. Two E2M1 codes share a byte, the first in its low half.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "E2M1_VALUES",
    "FP4_MAX",
    "FP8_MAX",
    "decode_e2m1",
    "decode_e8m0",
    "encode_e2m1",
    "encode_e8m0",
    "pack_nibbles",
    "to_fp8",
    "unpack_nibbles",
]

FP8_MAX = 448.0
FP4_MAX = 6.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def to_fp8(x: Tensor) -> Tensor:
    """Round to E4M3, ties to even; what is too large becomes 448 (PyTorch's own cast would make it NaN)."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [..., 2 n] with values below 16 -> uint8 [..., n]."""
    pairs = codes.unflatten(-1, (-1, 2))
    packed: Tensor = pairs[..., 0] | (pairs[..., 1] << 4)
    return packed


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [..., n] -> uint8 [..., 2 n]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def decode_e2m1(packed: Tensor) -> Tensor:
    """uint8 [..., n] -> float32 [..., 2 n]."""
    table = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=packed.device)
    return table[unpack_nibbles(packed).int()]


def encode_e2m1(x: Tensor) -> Tensor:
    """float32 [..., 2 n] -> packed uint8 [..., n]; to nearest, ties to the even code, beyond 6 saturating.

    The sign of zero is kept.
    """
    magnitude = x.abs()
    code = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    # Half-way points between neighbours; a tie goes to the even code: upwards only from odd ones.
    for lower, middle in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)):
        code += (magnitude >= middle) if lower % 2 else (magnitude > middle)
    return pack_nibbles(code | (torch.signbit(x).to(torch.uint8) << 3))


def decode_e8m0(exponents: Tensor) -> Tensor:
    """uint8 -> float32 ``2 ** (e - 127)``; 255 is NaN."""
    values = torch.exp2(exponents.double() - 127.0).float()
    return torch.where(exponents == 255, torch.nan, values)


def encode_e8m0(x: Tensor) -> Tensor:
    """The exponent of the largest power of two at or below each positive float32; uint8, at least 0."""
    _, exponent = torch.frexp(x.float())
    return (exponent - 1 + 127).clamp(0, 254).to(torch.uint8)
