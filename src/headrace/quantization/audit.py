"""Packed weights beside the 16-bit weights that they stand for: is every piece of every matrix what it should be?"""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor

__all__ = ["MatrixError", "audit"]

_PIECE = 64  # columns that are judged together; one row each
_FLOOR = 0.25  # of the row's own size: pieces that small may well be lost
_LIMITS = {8: 0.25, 4: 0.6}  # bits -> relative error of one piece that no sound rounding reaches


class MatrixError(msgspec.Struct, frozen=True, kw_only=True):
    """How one matrix differs from its reference.

    Attributes:
        name: of the linear within the model.
        error: relative root-mean-square error of the whole matrix.
        worst: of its worst piece (one row, 64 columns), relative to the piece or a quarter of its row.
        bad_pieces: pieces beyond what rounding explains; any is a defect.
        where: row and column at which the first of them begins.
    """

    name: str
    error: float
    worst: float
    bad_pieces: int = 0
    where: tuple[int, int] | None = None


def audit(name: str, packed: Tensor, reference: Tensor, *, bits: int) -> MatrixError:
    """Compare piece by piece, so that a wrong scale, swapped halves or a missing block cannot hide in the sum.

    Args:
        packed: what the packed weight stands for, float32 [rows, columns].
        reference: the unquantized weight, same shape.
        bits: of a packed value, 4 or 8.
    """
    assert packed.shape == reference.shape, (name, packed.shape, reference.shape)
    rows, columns = packed.shape
    width = -columns % _PIECE
    full = torch.nn.functional.pad(reference.float(), (0, width)).view(rows, -1, _PIECE)
    difference = torch.nn.functional.pad(packed.float(), (0, width)).view(rows, -1, _PIECE) - full
    size = full.square().sum(-1)
    floor = size.sum(1, keepdim=True) * (_PIECE / columns) * _FLOOR**2
    error = (difference.square().sum(-1) / torch.maximum(size, floor).clamp(min=1e-30)).sqrt()
    error = error.nan_to_num(nan=torch.inf)
    whole = (difference.square().sum() / size.sum().clamp(min=1e-30)).sqrt()
    bad = (error > _LIMITS[bits]).nonzero()
    where = (int(bad[0, 0]), int(bad[0, 1]) * _PIECE) if len(bad) else None
    return MatrixError(
        name=name, error=float(whole), worst=float(error.max()), bad_pieces=len(bad), where=where
    )
