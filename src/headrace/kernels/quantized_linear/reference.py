"""Activations rounded to FP8, straight from the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.quantized_linear.formats import FP8_MAX, to_fp8

__all__ = ["quantize_rows", "round_activations"]


def quantize_rows(
    x: Tensor, *, group: int | None = None, norm: tuple[Tensor, float] | None = None
) -> tuple[Tensor, Tensor]:
    if norm is not None:
        gain, eps = norm
        wide = x.float()
        x = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * gain.float()).to(x.dtype)
    columns = x.shape[1]
    group = group or columns
    tiles = torch.nn.functional.pad(x.float(), (0, -columns % group)).unflatten(1, (-1, group))
    scale = tiles.abs().amax(-1).clamp(min=1e-10) / FP8_MAX
    codes = to_fp8(tiles / scale[..., None]).flatten(1)[:, :columns]
    return codes.contiguous(), scale


def round_activations(x: Tensor, *, group: int | None = None, scale: Tensor | None = None) -> Tensor:
    if scale is not None:
        return to_fp8(x.float() / scale).float() * scale
    codes, scales = quantize_rows(x, group=group)
    return codes.float() * scales.repeat_interleave(group or x.shape[1], 1)[:, : x.shape[1]]
