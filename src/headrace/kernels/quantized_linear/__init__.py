"""Linear maps over weights of few bits, and the rounding of activations before them."""

from __future__ import annotations

from torch import Tensor

from headrace.kernels.dispatch import kernel

__all__ = ["quantize_rows", "round_activations"]


def quantize_rows(
    x: Tensor, *, group: int | None = None, norm: tuple[Tensor, float] | None = None
) -> tuple[Tensor, Tensor]:
    """Round rows to FP8 (E4M3), each with its own scale, largest value at 448.

    Args:
        x: [M, K].
        group: columns that share a scale; None: the whole row.
        norm: gain [K] and eps of an RMS norm that comes first; its result is rounded to x's type.

    Returns:
        float8_e4m3fn [M, K] and float32 [M, ceil(K / group)].
    """
    run = kernel("quantized_linear", "quantize_rows", x.device.type)
    return run(x, group=group, norm=norm)  # type: ignore[no-any-return]


def round_activations(x: Tensor, *, group: int | None = None, scale: Tensor | None = None) -> Tensor:
    """What x becomes when it is rounded to FP8 and back, float32.

    Args:
        x: [M, K].
        group: columns that share a scale; None: the whole row.
        scale: a float32 scalar that is used instead (static scales); larger values saturate.
    """
    from headrace.kernels.quantized_linear import reference

    return reference.round_activations(x, group=group, scale=scale)
