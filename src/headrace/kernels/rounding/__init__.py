"""Rows rounded to eight bits, each with its own scale, where they are made: by a norm, an activation or a gate.

A norm that is followed by a pass that rounds costs two reads and a write more than the norm that rounds.

FP8 (E4M3) is rounded as it is. Integers have even steps, and a few large columns would take all of them: so each 32
columns are rotated by a Hadamard matrix first (Ashkboos et al. 2024), inputs and weights alike, which changes no
product. MiniLM's vectors have cosine 0.9994 with float32 then, and 0.9937 without; FP8's have 0.9966.

FP8's error is relative, so that a scale many times too large costs nothing: where weights say how large results can
become (`Bound`), a product or an attention rounds them as it writes them, and no pass has to look for their largest.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headrace.kernels.dispatch import kernel

__all__ = [
    "BLOCK",
    "Bound",
    "Format",
    "Rounded",
    "activate",
    "gate",
    "hadamard",
    "linear",
    "norm",
    "rows",
    "top",
    "values",
    "within",
]

Format = Literal["fp8", "int8"]
BLOCK = 32  # columns that are rotated together; widths are multiples of it for int8


@dataclass(frozen=True, slots=True)
class Bound:
    """No number of a result is larger in magnitude, whatever the input.

    Attributes:
        limit: that magnitude.
        scale: of FP8 codes that reach so far, float32 [1, 1].
    """

    limit: float
    scale: Tensor

    @staticmethod
    def of(limit: float, device: torch.device) -> Bound:
        return Bound(limit, torch.full((1, 1), limit / top("fp8"), device=device))

    @property
    def factor(self) -> float:
        """From numbers to codes."""
        return top("fp8") / self.limit


@dataclass(slots=True)
class Rounded:
    """``codes * scale``.

    Attributes:
        codes: float8_e4m3fn or int8 [T, D].
        scale: float32 [T, 1]; NaN where a row held something that is not finite. [1, 1]: one for all rows, and what
            is not finite is NaN itself (FP8 has one).
        full: the same before it was rounded [T, D], where it is needed too.
    """

    codes: Tensor
    scale: Tensor
    full: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape


def top(format: Format) -> float:
    """The largest code."""
    return 448.0 if format == "fp8" else 127.0


@functools.cache
def hadamard(device: torch.device) -> Tensor:
    """The rotation, float32 [BLOCK, BLOCK]: orthogonal, and its own inverse."""
    found = torch.ones(1, 1, device=device)
    while found.shape[0] < BLOCK:
        found = torch.cat((torch.cat((found, found), 1), torch.cat((found, -found), 1)))
    scaled: Tensor = found * BLOCK**-0.5
    return scaled


def rows(x: Tensor, format: Format) -> Rounded:
    """x [T, D], contiguous."""
    return kernel("rounding", "rows", x.device.type)(x, format)  # type: ignore[no-any-return]


def within(x: Tensor, bound: Bound) -> Rounded:
    """x [T, D] in FP8 with the one scale of its bound, on any device."""
    codes = x.float() * bound.factor
    codes += codes * 0.0  # what is infinite becomes NaN
    return Rounded(codes.clamp(-top("fp8"), top("fp8")).to(torch.float8_e4m3fn), bound.scale)


def values(rounded: Rounded) -> Tensor:
    """What it stands for before any rotation, float32 [T, D]."""
    found = rounded.codes.float() * rounded.scale
    if rounded.codes.dtype is torch.int8:
        found = (found.view(-1, BLOCK) @ hadamard(found.device)).view(found.shape)
    return found


def norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    format: Format,
    *,
    layer: bool,
    full: bool = False,
    keep: bool = False,
) -> Rounded:
    """The norm of x, or of ``residual + x``.

    Args:
        x, residual: [T, D].
        layer: layer norm, else RMS norm.
        full: the norm in 16 bits is needed, too.
        keep: ``residual`` becomes the sum, rounded before it is normed.
    """
    run = kernel("rounding", "norm", x.device.type)
    return run(x, residual, weight, bias, eps, format, layer=layer, full=full, keep=keep)  # type: ignore[no-any-return]


def activate(x: Tensor, bias: Tensor | None, name: str, format: Format) -> Rounded:
    """``name(x + bias)``, x [T, D]."""
    return kernel("rounding", "activate", x.device.type)(x, bias, name, format)  # type: ignore[no-any-return]


def gate(gate_up: Tensor, bias: Tensor | None, name: str, format: Format) -> Rounded:
    """``name(gate) * up`` of gate_up [T, 2 I] + bias."""
    return kernel("rounding", "gate", gate_up.device.type)(gate_up, bias, name, format)  # type: ignore[no-any-return]


def linear(
    x: Rounded,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    activation: str | None = None,
    rounds: Format | None = None,
    bound: Bound | None = None,
) -> Tensor | Rounded:
    """``activation(x @ (weight * scale).T + bias)``.

    Args:
        weight: of x's format [N, D]; scale: float32 [N]; bias: [N] or None.
        dtype: of the result.
        rounds: the result goes to another product of eight bits.
        bound: of the result, if it is rounded to FP8 with one scale.
    Returns:
        [T, N].
    """
    run = kernel("rounding", "linear", weight.device.type)
    return run(x, weight, scale, bias, dtype, activation, rounds, bound)  # type: ignore[no-any-return]
