"""One vector of each run of rows: sums, means and maxima over the sequences of a packed batch."""

from __future__ import annotations

from torch import Tensor

from headrace.kernels.dispatch import kernel

__all__ = ["segment_pool"]


def segment_pool(values: Tensor, starts: Tensor, mode: str) -> Tensor:
    """Reduce rows ``starts[i]`` to ``starts[i + 1] - 1`` of values to row i.

    Args:
        values: [T, D].
        starts: int32 [S + 1], ascending.
        mode: ``sum``, ``mean``, ``max`` or ``weighted_mean`` (weights 1, 2, 3, ... within each run).
    Returns:
        float32 [S, D]; rows of empty runs mean nothing.
    """
    return kernel("pooling", "segment_pool", values.device.type)(values, starts, mode)  # type: ignore[no-any-return]
