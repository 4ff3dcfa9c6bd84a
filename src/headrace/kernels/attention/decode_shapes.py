"""How decode attention is cut, by the sequences of a step and the longest of them."""

from __future__ import annotations

from typing import NamedTuple

from headrace.config.plan.scratch import LONG_GRAPH_HEADS

__all__ = ["DecodeShape", "decode_shape", "is_long"]

_MULTIPROCESSORS = 128  # of GPUs that the shapes were measured on, about


class DecodeShape(NamedTuple):
    """How decode attention is cut.

    Attributes:
        tile: keys of one load.
        min_split: keys of the smallest piece.
        programs: on each multiprocessor.
        registers: of a thread at most; None: the compiler decides.
        early: programs may start while the kernel before still runs.
        splits: pieces of a sequence at most; no more than triton_decode.MAX_SPLITS.
    """

    tile: int
    min_split: int
    programs: int
    warps: int
    stages: int
    registers: int | None = None
    early: bool = True
    splits: int = 32


def is_long(num_heads: int, head_dim: int, longest: int) -> bool:
    """Whether a step is cut for long sequences: when the shape for short ones has more pieces than programs.

    Graphs of decode steps are captured for both answers: lengths are known to the host when a step begins.

    Args:
        num_heads: sequences times key heads.
        longest: keys of the longest sequence.
    """
    if num_heads > LONG_GRAPH_HEADS or head_dim > 128:
        return False
    shape = _short(num_heads)
    return num_heads * longest > shape.min_split * shape.programs * _MULTIPROCESSORS


def _short(num_heads: int) -> DecodeShape:
    return DecodeShape(64, 64, 1, 4, 3) if num_heads <= 32 else DecodeShape(64, 512, 2, 4, 4)


def decode_shape(num_heads: int, padded: int, long: bool) -> DecodeShape:
    """For ``num_heads`` sequences times key heads, of ``padded`` dimensions; ``long``: as is_long has it.

    Small programs, many on a multiprocessor, hide each other's start and end best. Of few of them, those with work
    would all land on the multiprocessors that the kernel before leaves free: there they wait for its end instead,
    and few short sequences are left to large programs (measured on one H200, docs/decisions/0071).
    """
    if padded > 128:
        return DecodeShape(32, 128, 1, 4, 3)
    if num_heads > LONG_GRAPH_HEADS:
        return DecodeShape(16, 2048 if num_heads >= 1024 else 1024, 8, 1, 4)
    if long:
        if num_heads <= 32:
            return DecodeShape(16, 64, 8, 1, 4, early=False)
        return DecodeShape(16, 512, 8, 1, 4, early=False, splits=16)
    return _short(num_heads)
