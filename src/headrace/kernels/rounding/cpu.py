"""Integers on CPUs: products of a few rows at a time, so that what follows a product finds it in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.dense.reference import activated
from headrace.kernels.norm.cpu import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from headrace.kernels.rounding import BLOCK, Bound, Format, Rounded, hadamard, reference

__all__ = ["gate", "linear", "norm", "rows"]

_ROWS = 128  # of a piece, for each thread


def rows(x: Tensor, format: Format) -> Rounded:
    if format != "int8":
        return reference.rows(x, format)
    codes = torch.empty(x.shape, dtype=torch.int8)
    scale = torch.empty(x.shape[0], 1)
    for at in range(0, x.shape[0], step := _ROWS * torch.get_num_threads()):
        _round(x[at : at + step], codes[at : at + step], scale[at : at + step])
    return Rounded(codes, scale)


def _round(x: Tensor, codes: Tensor, scale: Tensor) -> None:
    turned = torch.mm(x.float().reshape(-1, BLOCK), hadamard(x.device)).view(x.shape)
    torch.amax(turned.abs(), 1, keepdim=True, out=scale)
    scale.clamp_(min=1e-10).mul_(1 / 127)
    codes.copy_(turned.div_(scale).round_())
    scale.masked_fill_(~scale.isfinite(), torch.nan)


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
    if residual is not None and keep:
        y = (
            add_layer_norm(x, residual, weight, bias, eps)
            if layer
            else add_rms_norm(x, residual, weight, eps)
        )[0]
    elif layer:
        y = layer_norm(x, weight, bias, eps, residual)
    else:
        y = rms_norm(x if residual is None else residual + x, weight, eps)
    found = rows(y, format)
    return Rounded(found.codes, found.scale, y if full else None)


def gate(gate_up: Tensor, bias: Tensor | None, name: str, format: Format) -> Rounded:
    first, up = (gate_up if bias is None else gate_up + bias).chunk(2, -1)
    return rows(activated(first, name).mul_(up), format)


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
    if weight.dtype is not torch.int8 or rounds == "fp8":
        return reference.linear(x, weight, scale, bias, dtype, activation, rounds, bound)
    count, width = x.codes.shape[0], weight.shape[0]
    step = _ROWS * torch.get_num_threads()
    made = (
        None
        if rounds is None
        else Rounded(torch.empty(count, width, dtype=torch.int8), torch.empty(count, 1))
    )
    whole = torch.empty(count, width, dtype=dtype) if made is None else None
    for at in range(0, count, step):
        part = slice(at, at + step)
        sums = torch._int_mm(x.codes[part], weight.t()).float().mul_(x.scale[part]).mul_(scale)
        if bias is not None:
            sums.add_(bias)
        if activation is not None:
            sums = activated(sums, activation)
        if made is not None:
            _round(sums, made.codes[part], made.scale[part])
        elif whole is not None:
            whole[part] = sums
    return whole if made is None else made  # type: ignore[return-value]
