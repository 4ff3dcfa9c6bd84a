"""ggml's block formats as groups of integers with a scale and an offset, and back to float32.

Layouts are those of https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h. Each function
takes uint8 [n, bytes of a block]. Every format here is ``values * scale + offset`` over groups of 16 or 32;
products and sums are rounded in ggml's order, so that results equal those of the ``gguf`` package bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from headrace.checkpoints.gguf_header import BLOCKS
from headrace.errors import UnsupportedCheckpoint

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["DEQUANTIZABLE", "Groups", "dequantize", "unpack"]

_CHUNK_ELEMENTS = 1 << 20  # temporaries of one chunk stay in the CPU's cache
_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # doubled


class Groups(NamedTuple):
    """Numbers of n blocks, before they are multiplied out.

    Attributes:
        values: int8 or uint8 [n, groups, size], size 16 or 32.
        scale: float32 [n, groups].
        offset: float32 [n, groups], or None for zero.
    """

    values: Tensor
    scale: Tensor
    offset: Tensor | None


def dequantize(raw: Tensor, ggml_type: str, dtype: torch.dtype | None = None) -> Tensor:
    """Rows of blocks to rows of numbers.

    Args:
        raw: uint8 [rows, bytes_per_row], contiguous.
        ggml_type: a block type, for instance ``Q4_K``.
        dtype: of the result; float32 when None.

    Returns: [rows, columns]. Raises UnsupportedCheckpoint for a type that is not implemented.
    """
    import torch

    function = _function(ggml_type)
    elements, size = BLOCKS[ggml_type]
    blocks = raw.reshape(-1, size)
    out = torch.empty(blocks.shape[0], elements, dtype=dtype or torch.float32, device=raw.device)
    step = max(_CHUNK_ELEMENTS // elements, 1)
    for start in range(0, blocks.shape[0], step):
        values, scale, offset = function(blocks[start : start + step])
        numbers = values.float().mul_(scale.unsqueeze(-1))
        if offset is not None:
            numbers += offset.unsqueeze(-1)
        out[start : start + step] = numbers.view(-1, elements)
    return out.view(raw.shape[0], -1)


def unpack(raw: Tensor, ggml_type: str) -> Groups:
    """Rows of blocks to groups: uint8 [rows, bytes_per_row] to values [rows, groups of the row, size].

    Raises UnsupportedCheckpoint for a type that is not implemented.
    """
    values, scale, offset = _function(ggml_type)(raw.reshape(-1, BLOCKS[ggml_type][1]))
    rows = raw.shape[0]
    shaped = None if offset is None else offset.reshape(rows, -1)
    return Groups(values.reshape(rows, -1, values.shape[-1]), scale.reshape(rows, -1), shaped)


def _function(ggml_type: str) -> Callable[[Tensor], Groups]:
    function = _FUNCTIONS.get(ggml_type)
    if function is None:
        raise UnsupportedCheckpoint(
            f"ggml type {ggml_type} cannot be read; supported are {', '.join(sorted(DEQUANTIZABLE))}. "
            "Requantize the file, for instance with `llama-quantize --allow-requantize`"
        )
    return function


def _half(part: Tensor) -> Tensor:
    """Two bytes a row, a float16, as float32 [n, 1]."""
    import torch

    return part.contiguous().view(torch.float16).float()


def _nibbles(part: Tensor) -> Tensor:
    """[n, k] bytes to [n, 2k]: all low halves, then all high halves."""
    import torch

    return torch.cat((part & 15, part >> 4), dim=-1)


def _bits(part: Tensor, width: int) -> Tensor:
    """[n, k] bytes to [n, 8 / width, k]: fields of ``width`` bits, lowest first."""
    import torch

    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=part.device)
    return (part.unsqueeze(-2) >> shifts.view(-1, 1)) & ((1 << width) - 1)


def _fifth_bits(part: Tensor) -> Tensor:
    """Four bytes to 32 fifth bits, bit i of the word for element i, already in place (value 16)."""
    return _bits(part, 1).transpose(-1, -2).reshape(part.shape[0], 32) << 4


def _q4_0(b: Tensor) -> Groups:
    return Groups((_nibbles(b[:, 2:]).view(_int8()) - 8).unsqueeze(1), _half(b[:, :2]), None)


def _q4_1(b: Tensor) -> Groups:
    return Groups(_nibbles(b[:, 4:]).unsqueeze(1), _half(b[:, :2]), _half(b[:, 2:4]))


def _q5_0(b: Tensor) -> Groups:
    values = _nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6])
    return Groups((values.view(_int8()) - 16).unsqueeze(1), _half(b[:, :2]), None)


def _q5_1(b: Tensor) -> Groups:
    values = _nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8])
    return Groups(values.unsqueeze(1), _half(b[:, :2]), _half(b[:, 2:4]))


def _q8_0(b: Tensor) -> Groups:
    return Groups(b[:, 2:].contiguous().view(_int8()).unsqueeze(1), _half(b[:, :2]), None)


def _q2_k(b: Tensor) -> Groups:
    """16 scales and minima of 4 bits, 256 values of 2 bits, d, dmin."""
    scales, d, dmin = b[:, :16], _half(b[:, 80:82]), _half(b[:, 82:84])
    values = _bits(b[:, 16:80].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)
    return Groups(values, d * (scales & 15).float(), -(dmin * (scales >> 4).float()))


def _q3_k(b: Tensor) -> Groups:
    """256 third bits, 256 values of 2 bits, 16 scales of 6 bits, d. A clear third bit means -4."""
    packed = b[:, 96:108]
    high = _bits(packed[:, 8:], 2).reshape(-1, 16)
    scales = (_nibbles(packed[:, :8]) | high << 4).float() - 32
    third = _bits(b[:, :32], 1).reshape(-1, 256)
    low = _bits(b[:, 32:96].reshape(-1, 2, 32), 2).reshape(-1, 256)
    values = low.view(_int8()) - ((third ^ 1) << 2).view(_int8())
    return Groups(values.view(-1, 16, 16), _half(b[:, 108:110]) * scales, None)


def _scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes to eight scales and eight minima of 6 bits, as float32 [n, 8]."""
    import torch

    a, m, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((a & 63, (rest & 15) | ((a >> 2) & 48)), dim=-1)
    minima = torch.cat((m & 63, (rest >> 4) | ((m >> 2) & 48)), dim=-1)
    return scales.float(), minima.float()


def _q4_k(b: Tensor) -> Groups:
    scales, minima = _scales_and_minima(b[:, 4:16])
    values = _nibbles(b[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return Groups(values, _half(b[:, :2]) * scales, -(_half(b[:, 2:4]) * minima))


def _q5_k(b: Tensor) -> Groups:
    scales, minima = _scales_and_minima(b[:, 4:16])
    low = _nibbles(b[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    values = low | _bits(b[:, 16:48], 1) << 4
    return Groups(values, _half(b[:, :2]) * scales, -(_half(b[:, 2:4]) * minima))


def _q6_k(b: Tensor) -> Groups:
    """256 low halves, 256 upper pairs of bits, 16 signed scales, d."""
    low = _nibbles(b[:, :128].reshape(-1, 2, 64)).reshape(-1, 256)
    high = _bits(b[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 256)
    values = (low | high << 4).view(_int8()) - 32
    scales = b[:, 192:208].contiguous().view(_int8()).float()
    return Groups(values.view(-1, 16, 16), _half(b[:, 208:]) * scales, None)


def _int8() -> torch.dtype:
    import torch

    return torch.int8


def _table(values: tuple[int, ...], index: Tensor) -> Tensor:
    import torch

    return torch.tensor(values, dtype=torch.int8, device=index.device)[index.long()]


def _iq4_nl(b: Tensor) -> Groups:
    return Groups(_table(_IQ4_VALUES, _nibbles(b[:, 2:])).unsqueeze(1), _half(b[:, :2]), None)


def _iq4_xs(b: Tensor) -> Groups:
    """d, the upper 2 bits of eight scales in 2 bytes, the lower 4 bits in 4 bytes, 256 indices of 4 bits."""
    import torch

    low = torch.stack((b[:, 4:8] & 15, b[:, 4:8] >> 4), dim=-1).view(-1, 8)
    high = _bits(b[:, 2:4], 2).transpose(-1, -2).reshape(-1, 8)
    scales = (low | high << 4).float() - 32
    values = _table(_IQ4_VALUES, _nibbles(b[:, 8:].reshape(-1, 8, 16)))
    return Groups(values, _half(b[:, :2]) * scales, None)


def _mxfp4(b: Tensor) -> Groups:
    """A power of two (E8M0, halved because the table is doubled) and 32 values of E2M1 (OCP MX 1.0)."""
    import torch

    exponent = b[:, :1].to(torch.int32)
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return Groups(_table(_E2M1_VALUES, _nibbles(b[:, 1:])).unsqueeze(1), bits.view(torch.float32), None)


_FUNCTIONS: dict[str, Callable[[Tensor], Groups]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}

DEQUANTIZABLE = frozenset(_FUNCTIONS)
"""Block types that can be read, beside the plain F32, F16, BF16 and F64."""
