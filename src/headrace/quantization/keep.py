"""Quantized matrices of a checkpoint as linears of about the same size, where the device has use for them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from headrace.kernels.quantized_linear.formats import unpack_nibbles
from headrace.quantization.containers import QuantizedCheckpoint
from headrace.quantization.experts import PackedExperts, ScaledExperts, multiplies_experts
from headrace.quantization.linear import JoinedLinear
from headrace.quantization.scaled import QuantizedWeight, ScaledLinear, joined_linear
from headrace.quantization.schemes.fp8 import Fp8Weight
from headrace.quantization.schemes.group_int import GroupIntWeight
from headrace.quantization.schemes.int4 import GROUPS, Int4Linear, Int4Weight, fast_on_this_cpu
from headrace.quantization.schemes.table import TableWeight

__all__ = ["keeps_quantized", "quantized_experts", "quantized_linear"]

_LEAST_COLUMNS = 128  # that share a scale, for the kernels of FP8


def keeps_quantized(checkpoint: QuantizedCheckpoint, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether linears over the checkpoint's own numbers serve it better than dense ones.

    On a GPU always (``quantized_linear`` knows what no kernel reads). On a CPU only 4-bit integers in groups that its
    kernel knows; others are dequantized as they load, which is exact, as fast as 16-bit weights, and as large.
    """
    if not checkpoint.modules:
        return False
    if device.type != "cpu":
        return True
    if dtype is not torch.bfloat16 or not fast_on_this_cpu():
        return False
    first = checkpoint.quantized(next(iter(checkpoint.modules)))
    return _for_cpu_kernel([first])


def quantized_linear(
    checkpoint: QuantizedCheckpoint,
    names: Sequence[str],
    bias: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
    orders: Sequence[Tensor | None] = (),
) -> nn.Module | None:
    """One linear from the matrices of one or several projections over the same input, rows one after another.

    None when not all of them are quantized, or no kernel reads them packed: they are then loaded dense.

    Args:
        orders: of the rows of each, int64 [rows]; None: as they lie.
    """
    if not all(name in checkpoint.modules for name in names):
        return None
    modules = [checkpoint.modules[name] for name in names]
    weights = _packed([module.read() for module in modules], device)
    if weights is None:
        return None
    if orders:
        weights = [w if order is None else w.reordered(order) for w, order in zip(weights, orders)]
    if device.type == "cpu" and dtype is torch.bfloat16 and fast_on_this_cpu() and _for_cpu_kernel(weights):
        return _cpu_linear([weight for weight in weights if isinstance(weight, GroupIntWeight)], bias)
    bias = None if bias is None else bias.to(device, dtype)
    activations = [module.activations() for module in modules]
    together = joined_linear(
        [weight.to(device) for weight in weights],
        bias=bias,
        activations=[part.to(device) for part in activations],
    )
    if together is not None:
        return together
    starts = torch.tensor([0, *(weight.shape[0] for weight in weights)]).cumsum(0).tolist()
    return JoinedLinear(
        [
            ScaledLinear(
                weight.to(device),
                bias=None if bias is None else bias[start : start + weight.shape[0]],
                activations=part.to(device),
            )
            for weight, part, start in zip(weights, activations, starts)
        ]
    )


def quantized_experts(
    checkpoint: QuantizedCheckpoint,
    names: Sequence[str],
    num_experts: int,
    bias: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module | None:
    """The same of all experts of a layer: their matrices one after another, or all in one tensor.

    None also when their formats do not go together, or a GPU's kernels do not take them.
    """
    if not all(name in checkpoint.modules for name in names):
        return None
    modules = [checkpoint.modules[name] for name in names]
    weights = _packed([module.read() for module in modules], device)
    if weights is None:
        return None
    parts = len(names) // num_experts  # of one expert; 0: all are in one tensor
    cpu = device.type == "cpu"
    if cpu and parts and dtype is torch.bfloat16 and fast_on_this_cpu() and _for_cpu_kernel(weights):
        ints = [weight for weight in weights if isinstance(weight, GroupIntWeight)]
        biases = [None] * num_experts if bias is None else bias.chunk(num_experts)
        return PackedExperts(
            [_cpu_linear(ints[i * parts : (i + 1) * parts], each) for i, each in enumerate(biases)]
        )
    if not cpu and not all(multiplies_experts(weight, 1 if parts else num_experts) for weight in weights):
        return None
    return joined_linear(
        [weight.to(device) for weight in weights],
        bias=None if bias is None else bias.to(device, dtype),
        activations=[module.activations().to(device) for module in modules],
        build=partial(ScaledExperts, num_experts=num_experts),
    )


def _packed(
    weights: Sequence[QuantizedWeight | TableWeight], device: torch.device
) -> list[QuantizedWeight] | None:
    """The same, or None when a linear over one of them would be no faster than a dense one, or is not had.

    On GPUs these are FP8 weights with a scale for fewer columns than a kernel reads at once (MXFP8).
    """
    found: list[QuantizedWeight] = []
    for weight in weights:
        if isinstance(weight, TableWeight):
            return None
        fine = isinstance(weight, Fp8Weight) and weight.block[1] < _LEAST_COLUMNS < weight.shape[1]
        if fine and device.type != "cpu":
            return None
        found.append(weight)
    return found


def _for_cpu_kernel(weights: Sequence[QuantizedWeight | TableWeight]) -> bool:
    first = weights[0]
    return isinstance(first, GroupIntWeight) and all(
        isinstance(weight, GroupIntWeight)
        and weight.bits == 4
        and weight.order is None
        and weight.group in GROUPS
        and weight.joins(first)
        for weight in weights
    )


def _cpu_linear(weights: Sequence[GroupIntWeight], bias: Tensor | None) -> Int4Linear:
    """Codes are kept, scales and zeros rounded to bfloat16 (see schemes/int4.py)."""
    joined = GroupIntWeight.joined(weights)
    values = unpack_nibbles(joined.codes).unflatten(1, (-1, joined.group))
    packed = Int4Weight.one_plane(values, joined.scale, -joined.zero * joined.scale, low=0)
    return Int4Linear(packed, bias=bias, parts=tuple(weight.shape[0] for weight in weights))
