"""Weights of 8 bits as the kernels read them, of dense layers and of experts alike."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["FP8", "INT8", "WIDE_FP8", "EightBitWeight", "launch_inputs", "reads_groups"]

FP8, INT8, WIDE_FP8 = 0, 1, 2
"""FP8 weights and activations; integers and 16-bit activations; FP8 weights and 16-bit activations (experts only)."""

_STEP = 128  # columns that kernels decode at once


class EightBitWeight(NamedTuple):
    """[N, K], of experts one after another.

    Attributes:
        form: FP8, INT8 or WIDE_FP8.
        codes: float8_e4m3fn, or uint8 for INT8, [N, K].
        scale: float32 [ceil(N / height), groups of ``group`` columns]; with ``row_scale`` it is not read.
        group: columns that share a scale; 0: all, see ``row_scale``.
        height: rows that share a scale, of FP8.
        zero: float32 like ``scale``, of INT8: the code that stands for 0.
        row_scale: float32 [N] of FP8 with a scale a row.
    """

    form: int
    codes: Tensor
    scale: Tensor
    group: int = 0
    height: int = 1
    zero: Tensor | None = None
    row_scale: Tensor | None = None


def reads_groups(group: int, columns: int) -> bool:
    """Whether kernels read 8-bit integers of which ``group`` of ``columns`` share a scale.

    What they decode at once are whole groups, or lies in one.
    """
    return group % 16 == 0 and (group >= columns or _STEP % group == 0 or group % _STEP == 0)


def launch_inputs(
    x: Tensor, weight: EightBitWeight, x_scale: Tensor | None, x_group: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A kernel's arguments from x_ptr to groups, and the flags that tell of them; what is not there is never read."""
    scale = weight.scale
    pointers = (
        x,
        x.stride(0),
        scale if x_scale is None else x_scale,
        1 if x_scale is None or not x_group else x_scale.shape[1],
        weight.codes,
        scale,
        scale if weight.zero is None else weight.zero,
        scale if weight.row_scale is None else weight.row_scale,
        scale.shape[1] if weight.group else 1,
    )
    flags = {
        "FORM": weight.form,
        "GROUP": weight.group,
        "HEIGHT": weight.height,
        "XGROUP": x_group,
        "STATIC": x_scale is not None and x_scale.dim() == 0,
        "ROW_SCALE": weight.row_scale is not None,
    }
    return pointers, flags
