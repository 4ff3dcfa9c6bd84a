"""Linear maps of few rows, fused with the norm before them and what follows them: the kernels of decode steps.

Large products are torch's (cuBLAS); these are for M up to MAX_ROWS, where a step is bound by reading weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.dispatch import kernel

__all__ = ["GATES", "MAX_ROWS", "argmax_linear", "fixed_linear", "small_linear"]

MAX_ROWS = 64
GATES = ("silu", "gelu", "gelu_tanh")


def small_linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm: tuple[Tensor, float] | None = None,
    bias: Tensor | None = None,
    gate: str | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``act(norm(x) @ weight.T + bias) + residual`` with float32 sums, rounded once at the end.

    Args:
        x: [M, K], M at most MAX_ROWS on a GPU, rows contiguous.
        weight: [N, K].
        norm: gain [K] and eps of an RMS norm of x.
        bias: [N].
        gate: one of GATES: the first N / 2 outputs go through it and multiply the others.
        residual: [M, N], or [M, N / 2] with a gate.

    Returns:
        [M, N] (N / 2 with a gate) in ``out_dtype`` (x's if None).
    """
    run = kernel("linear", "small_linear", x.device.type)
    return run(  # type: ignore[no-any-return]
        x, weight, norm=norm, bias=bias, gate=gate, residual=residual, out_dtype=out_dtype
    )


def argmax_linear(x: Tensor, weight: Tensor, *, norm: tuple[Tensor, float] | None = None) -> Tensor:
    """Index of the largest of ``norm(x) @ weight.T`` in each row, without writing the products.

    Returns:
        int64 [M]; -1 where a row holds NaN or infinity.
    """
    return kernel("linear", "argmax_linear", x.device.type)(x, weight, norm=norm)  # type: ignore[no-any-return]


def fixed_linear(x: Tensor, weight: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` for any number of rows, each summed in an order that does not depend on the others.

    Args:
        x: [M, K], rows contiguous.
        weight: [N, K].

    Returns:
        [M, N] like x.
    """
    return kernel("linear", "fixed_linear", x.device.type)(x, weight, bias=bias)  # type: ignore[no-any-return]
