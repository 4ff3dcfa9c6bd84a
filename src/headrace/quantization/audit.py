"""Packed weights beside the 16-bit weights that they stand for: is every piece of every matrix what it should be?"""

from __future__ import annotations

import math

import msgspec
import torch
from torch import Tensor

__all__ = ["MatrixError", "audit"]

_PIECE = 64  # columns that are judged together; one row each
_CHUNK = 1 << 23  # numbers that are judged at a time
_FLOOR = 0.25  # of the row's own size: pieces that small may well be lost
# Bits -> relative error of one piece that no sound rounding reaches (0.15 with 8 bits and 0.28 with 4, measured), and
# that half of a scale exceeds.
_LIMITS = {16: 0.03, 8: 0.25, 4: 0.4}
_SLACK = 1.8  # errors of 64 steps beside their mean; half a step each is 1.73
_ROUNDING = 0.55  # of a step: half, and the rounding of scales
_ASKEW = 0.4  # half of a scale is 0.5; noise of its size leaves 0.1 of 64 columns
_SHIFT = 0.25  # a zero point that is off by one is 0.3 to 0.5
_MISSING = 0.95  # a piece that is not there, or twice itself
# How far a factor of whole rows, and of as many rows together, may be from 1 by rounding, and what part of their error
# it is at least where it is a defect (measured: 0.026 and 0.0045 with 8 bits, 0.087 and 0.038 with 4).
_ROW_FACTOR = {8: (0.035, 0.7), 4: (0.12, 0.7)}
_ROWS_FACTOR = {8: (0.02, 0.5), 4: (0.06, 0.0)}
_ROWS = 64


class MatrixError(msgspec.Struct, frozen=True, kw_only=True):
    """How one matrix differs from its reference.

    Attributes:
        name: of the linear within the model.
        error: relative root-mean-square error of the whole matrix.
        worst: of its worst piece (one row, 64 columns), relative to the piece or a quarter of its row.
        bad_pieces: pieces beyond what rounding explains; any is a defect.
        where: row and column at which the first of them begins; of a wrong factor, its first row.
        factor: of rows that are the reference's times a number, that number; 1 where none are.
    """

    name: str
    error: float
    worst: float
    bad_pieces: int = 0
    where: tuple[int, int] | None = None
    factor: float = 1.0

    @property
    def problem(self) -> str:
        """What is wrong with it, as a sentence; "" for nothing."""
        if self.where is None:
            return ""
        row, column = self.where
        if not self.bad_pieces:
            return f"{self.name}: from row {row} on, rows are {self.factor:.2f} times the reference's: a wrong scale"
        return (
            f"{self.name}: {self.bad_pieces} pieces are not the reference's rounded (worst off by {self.worst:.2f} of "
            f"itself), the first at row {row}, column {column}: a wrong scale, order or block"
        )


def audit(
    name: str, packed: Tensor, reference: Tensor, *, bits: int, even: bool = False, fitted: int = 0
) -> MatrixError:
    """Compare piece by piece, so that a wrong scale, swapped halves or a missing block cannot hide in the sum.

    Args:
        packed: what the packed weight stands for, float32 [rows, columns].
        reference: the unquantized weight, same shape.
        bits: of a packed value, 4 or 8; 16 for one that was only cast.
        even: its values are integers times a scale a row, so that a large one leaves the others of its row few steps.
        fitted: how many columns share a scale, where rounding may have moved weights far, as inputs are small (GPTQ);
            0: nothing moved. A piece that stands alone in its row is no defect then unless it is missing, nor is one
            that is no further off than half a step, nor one whose error points nowhere: a wrong scale's lies along the
            reference, a wrong zero point's is the same in every column.
    """
    assert packed.shape == reference.shape, (name, packed.shape, reference.shape)
    rows, columns = packed.shape
    many = max(_CHUNK // columns, 1)
    lost = kept = worst = 0.0
    bad, where = 0, None
    factor, scaled_row = 1.0, 0
    for start in range(0, rows, many):
        part = slice(start, start + many)
        wanted = reference[part].float()
        error, difference, size, full = _pieces(packed[part].float(), wanted)
        lost, kept, worst = lost + difference, kept + size, max(worst, float(error.max()))
        beyond = error > _LIMITS[bits]
        if even:  # a step's error is a twelfth of its square
            step = wanted.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            beyond &= error * full > _SLACK * step * (_PIECE / 12) ** 0.5
        if fitted:
            beyond &= (beyond.sum(1, keepdim=True) >= min(2, beyond.shape[1])) | (error >= _MISSING)
            beyond &= error * full > _half_steps(wanted, fitted, bits)
            scaled, shifted = _directed(packed[part].float(), wanted, full)
            beyond &= (scaled > _ASKEW) | (shifted > _SHIFT)
        places = beyond.nonzero()
        if len(places) and where is None:
            where = (start + int(places[0, 0]), int(places[0, 1]) * _PIECE)
        bad += len(places)
        if factor == 1.0 and (found := _factor(packed[part].float(), wanted, bits, single=not fitted)):
            factor, scaled_row = found[0], start + found[1]
    if where is None and factor != 1.0:
        where = (scaled_row, 0)
    whole = math.sqrt(lost / max(kept, 1e-30)) if math.isfinite(lost) else math.inf
    return MatrixError(name=name, error=whole, worst=worst, bad_pieces=bad, where=where, factor=factor)


def _factor(packed: Tensor, reference: Tensor, bits: int, *, single: bool) -> tuple[float, int] | None:
    """A factor between rows of both that rounding does not explain, and the first of these rows.

    A piece's own error hides it: 1.2 times itself is less than what rounding to 4 bits may do to 64 columns.

    Args:
        single: look at single rows, too, not at many together alone.
    """
    if bits not in _ROW_FACTOR:
        return None
    along = (packed * reference).sum(1)
    size = reference.square().sum(1).clamp(min=1e-30)
    lost = (packed - reference).square().sum(1)
    for rows, (limit, share) in ((1, _ROW_FACTOR[bits]), (_ROWS, _ROWS_FACTOR[bits])):
        if rows == 1 and not single:
            continue
        wide = -len(size) % rows
        of_rows = [
            torch.nn.functional.pad(part, (0, wide)).view(-1, rows).sum(1) for part in (along, size, lost)
        ]
        moved = (of_rows[0] / of_rows[1] - 1).where(
            of_rows[1] > 1e-20, torch.zeros_like(of_rows[1])
        )  # rows of zeros
        wrong = (moved.abs() > limit) & (moved.abs() > share * (of_rows[2] / of_rows[1]).sqrt())
        if wrong.any():
            first = int(wrong.nonzero()[0, 0])
            return 1 + float(moved[first]), first * rows
    return None


def _half_steps(reference: Tensor, group: int, bits: int) -> Tensor:
    """The most that rounding to nearest takes from each piece [rows, pieces], its groups' largest values at the end."""
    columns = reference.shape[1]
    padded = torch.nn.functional.pad(reference, (0, -columns % group)).unflatten(1, (-1, group))
    step = padded.abs().amax(-1, keepdim=True).expand_as(padded).flatten(1)[:, :columns] / (
        2 ** (bits - 1) - 1
    )
    by_piece = torch.nn.functional.pad(step, (0, -columns % _PIECE)).unflatten(1, (-1, _PIECE))
    most: Tensor = by_piece.square().sum(-1).sqrt() * _ROUNDING
    return most


def _directed(packed: Tensor, reference: Tensor, full: Tensor) -> tuple[Tensor, Tensor]:
    """How much of each piece's error lies along its reference, and how much is common to its columns [rows, pieces].

    Relative to ``full``: the first is 0.5 for half or one and a half of the piece.
    """
    width = -packed.shape[1] % _PIECE
    wanted = torch.nn.functional.pad(reference, (0, width)).unflatten(1, (-1, _PIECE))
    error = torch.nn.functional.pad(packed, (0, width)).unflatten(1, (-1, _PIECE)) - wanted
    along = (error * wanted).sum(-1).abs() / wanted.square().sum(-1).clamp(min=1e-30).sqrt()
    common = error.sum(-1).abs() / _PIECE**0.5
    return (along / full).nan_to_num(nan=torch.inf), (common / full).nan_to_num(nan=torch.inf)


def _pieces(packed: Tensor, reference: Tensor) -> tuple[Tensor, float, float, Tensor]:
    """Error of each piece [rows, pieces], the sums of squares of difference and reference, and what 1 is of errors."""
    rows, columns = packed.shape
    width = -columns % _PIECE
    full = torch.nn.functional.pad(reference, (0, width)).view(rows, -1, _PIECE)
    squares = (torch.nn.functional.pad(packed, (0, width)).view(rows, -1, _PIECE) - full).square().sum(-1)
    size = full.square().sum(-1)
    floor = size.sum(1, keepdim=True) * (_PIECE / columns) * _FLOOR**2
    unit = torch.maximum(size, floor).clamp(min=1e-30).sqrt()
    error = (squares.sqrt() / unit).nan_to_num(nan=torch.inf)
    return error, float(squares.sum(dtype=torch.float64)), float(size.sum(dtype=torch.float64)), unit
