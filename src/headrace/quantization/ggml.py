"""Weights of a GGUF file kept packed: from ggml's blocks to linears and embeddings of about the same size.

Every code of the file is kept as it is. Scales and offsets are rounded to bfloat16, so a weight is off by no more
than about what a bfloat16 copy of the dense weights would be; float32 needs the dense weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from headrace.checkpoints.base import PackedTensor
from headrace.checkpoints.gguf_blocks import dequantize, unpack
from headrace.checkpoints.gguf_header import BLOCKS
from headrace.errors import UnsupportedCheckpoint
from headrace.quantization.linear import JoinedLinear, PackedLinear
from headrace.quantization.schemes.int4 import ROW_BLOCK, Int4Linear, Int4Weight

__all__ = ["KEEPABLE", "PackedEmbedding", "PackedHead", "packed_linear"]

_EXACT = 64  # most likely tokens whose logits are computed again
_CHUNK_ELEMENTS = 1 << 20  # of which the temporaries stay small

_ONE_PLANE = {"Q4_0": -8, "Q4_1": 0, "Q4_K": 0}  # lowest value of 16
_TWO_PLANES = {  # what is taken off the values to bring them into [-136, 119], near 0 where offsets allow
    "Q2_K": 0,
    "Q3_K": 0,
    "Q5_0": 0,
    "Q5_1": 16,
    "Q5_K": 16,
    "Q6_K": 0,
    "Q8_0": 8,
    "IQ4_NL": 0,
    "IQ4_XS": 0,
    "MXFP4": 0,
}

KEEPABLE = frozenset(_ONE_PLANE) | frozenset(_TWO_PLANES)
"""ggml types that packed_linear takes."""


def packed_linear(
    tensors: Sequence[PackedTensor], *, bias: Tensor | None = None
) -> PackedLinear | JoinedLinear:
    """One linear from the matrices of one or several projections over the same input, rows one after another.

    Args:
        tensors: in order; all with the same number of columns. Neighbours of one format become one product.
        bias: [all rows] or None.

    Raises UnsupportedCheckpoint for a ggml type that is not in KEEPABLE.
    """
    columns = {tensor.shape[1] for tensor in tensors}
    assert len(columns) == 1, f"projections over different inputs: {columns}"
    linears: list[PackedLinear] = []
    row = 0
    for ggml_type, members in groupby(tensors, key=lambda tensor: tensor.ggml_type):
        parts = list(members)
        rows = sum(part.shape[0] for part in parts)
        linears.append(
            Int4Linear(
                _weight(
                    ggml_type, torch.cat([part.raw for part in parts]) if len(parts) > 1 else parts[0].raw
                ),
                bias=None if bias is None else bias[row : row + rows],
                parts=tuple(part.shape[0] for part in parts),
            )
        )
        row += rows
    return linears[0] if len(linears) == 1 else JoinedLinear(linears)


def _weight(ggml_type: str, raw: Tensor) -> Int4Weight:
    """uint8 [rows, bytes_per_row] to the kernel's layout."""
    if ggml_type not in KEEPABLE:
        raise UnsupportedCheckpoint(
            f"ggml type {ggml_type} cannot be kept packed; {', '.join(sorted(KEEPABLE))} can. "
            "Load the weights dense (dtype float32 or bfloat16)"
        )
    elements, size = BLOCKS[ggml_type]
    columns = raw.shape[1] // size * elements
    step = max(_CHUNK_ELEMENTS // (columns * ROW_BLOCK), 1) * ROW_BLOCK

    def pieces() -> Iterator[Int4Weight]:
        for start in range(0, raw.shape[0], step):
            yield _piece(ggml_type, raw[start : start + step])

    return Int4Weight.joined(pieces(), raw.shape[0])


def _piece(ggml_type: str, raw: Tensor) -> Int4Weight:
    groups = unpack(raw, ggml_type)
    if ggml_type in _ONE_PLANE:
        return Int4Weight.one_plane(*groups, low=_ONE_PLANE[ggml_type])
    return Int4Weight.two_planes(*groups, center=_TWO_PLANES[ggml_type])


class PackedEmbedding(nn.Module):
    """Rows of a table that stays in the file's blocks, dequantized exactly as they are asked for.

    Args:
        tensor: [V, D] in blocks; usually a view of the file's memory map, so that only rows in use take memory.
        scale: factor of every row.
        dtype: of the result.
    """

    def __init__(self, tensor: PackedTensor, *, scale: float = 1.0, dtype: torch.dtype) -> None:
        super().__init__()
        self.tensor, self.scale, self.dtype = tensor, scale, dtype

    def forward(self, token_ids: Tensor) -> Tensor:
        """int64 [T] -> [T, D], a fresh tensor."""
        rows = dequantize(self.tensor.raw.index_select(0, token_ids), self.tensor.ggml_type, self.dtype)
        return rows if self.scale == 1.0 else rows.mul_(self.scale)


class PackedHead(nn.Module):
    """A language-model head in blocks whose most likely tokens do not tie.

    The packed product rounds its sums to bfloat16, steps of 1/8 at logits near 30: enough to make two candidates
    equal and to answer with the wrong one. So the `_EXACT` best of each row are computed again in float32, from
    the file's own blocks.

    Args:
        tensor: [V, D] in blocks, usually a view of the file's memory map.
    """

    def __init__(self, tensor: PackedTensor) -> None:
        super().__init__()
        self.linear = packed_linear([tensor])
        self.tensor = tensor

    def forward(self, hidden: Tensor) -> Tensor:
        """[P, D] -> float32 [P, V]."""
        logits: Tensor = self.linear(hidden).float()
        best = logits.topk(min(_EXACT, logits.shape[1]), sorted=False).indices
        raw = self.tensor.raw.index_select(0, best.flatten())
        rows = dequantize(raw, self.tensor.ggml_type, torch.float32).view(*best.shape, -1)
        return logits.scatter_(1, best, (rows @ hidden.float().unsqueeze(-1)).squeeze(-1))
