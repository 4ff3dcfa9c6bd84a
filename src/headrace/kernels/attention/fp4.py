"""An FP4 cache's rows: E2M1 codes with a scale for 16 dimensions of a head, in one tensor of bytes.

A row of D numbers is D / 2 bytes of codes (the first of two dimensions in the low half) and then D / 16 bytes of
scales: 9 bytes for 16 numbers. A scale has 5 bits of exponent, 3 of mantissa and no sign, ``2**(e - 24) (1 + m / 8)``,
so that values and keys of any usual size fit without a scale for the tensor; 255 is NaN. It is the largest magnitude
over 6, rounded. The cache's dtype is ``torch.float4_e2m1fn_x2``, which stands for one byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.quantized_linear.formats import decode_e2m1, encode_e2m1

__all__ = ["FP4", "GROUP", "decode", "encode", "row_bytes"]

FP4 = torch.float4_e2m1fn_x2
GROUP = 16
_OFFSET = (127 - 24) * 8  # of float32's exponent and first three bits of mantissa


def row_bytes(dim: int) -> int:
    """Bytes of a row of ``dim`` numbers."""
    assert dim % GROUP == 0, dim
    return dim // 2 + dim // GROUP


def encode(x: Tensor) -> Tensor:
    """[..., D] -> uint8 [..., row_bytes(D)]; what is too large saturates, what is not finite makes its group NaN."""
    groups = x.float().unflatten(-1, (-1, GROUP))
    peak = groups.abs().amax(-1)
    bits = ((peak / 6).contiguous().view(torch.int32) + (1 << 19)) >> 20
    finite = torch.isfinite(groups).all(-1)
    scale = torch.where(finite, (bits - _OFFSET).clamp(0, 254), 255).to(torch.uint8)
    codes = encode_e2m1(groups.nan_to_num() / _scales(scale).nan_to_num()[..., None])
    return torch.cat((codes.flatten(-2), scale), dim=-1)


def decode(rows: Tensor) -> Tensor:
    """uint8 [..., W] -> float32 [..., D]."""
    dim = rows.shape[-1] * 16 // 9
    values = decode_e2m1(rows[..., : dim // 2]).unflatten(-1, (-1, GROUP))
    numbers: Tensor = (values * _scales(rows[..., dim // 2 :])[..., None]).flatten(-2)
    return numbers


def _scales(codes: Tensor) -> Tensor:
    values = ((codes.int() + _OFFSET) << 20).view(torch.float32)
    scales: Tensor = torch.where(codes == 255, torch.nan, values)
    return scales
