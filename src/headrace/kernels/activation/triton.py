"""Gates, and activations with their bias, on GPUs: one read, one write. Lone activations are torch's own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.kernels.activation.cpu import activate
from headrace.kernels.launch import launch_options

__all__ = [
    "ACTIVATION_CODES",
    "activate",
    "activated",
    "bias_activate",
    "gelu_mul",
    "gelu_tanh_mul",
    "silu_mul",
]


ACTIVATION_CODES = {"silu": 1, "gelu_tanh": 2, "gelu": 3, "relu": 4, "tanh": 5, "relu2": 6}


@triton.jit
def activated(x, NAME: tl.constexpr):
    """One of ACTIVATION_CODES (0: nothing) of float32 numbers.

    gelu is the exact one: x Phi(x) = max(x, 0) - |x| Phi(-|x|), with log2 Phi(-|x|) as a polynomial, fitted so that
    gelu is off by 5e-7 at most. That is a third of erf's instructions, which cost more than the memory did.
    """
    if NAME == 1:
        x = x * tl.sigmoid(x)
    elif NAME == 2:
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif NAME == 3:
        far = tl.abs(x)
        log = 0.007084554466062265 - 0.00047330908522580373 * far
        log = -0.45999245491795020 + far * (-0.05182737248546371 + far * log)
        log = -1.0000376243650513 + far * (-1.150787842084628 + far * log)
        x = tl.maximum(x, 0.0) - far * tl.exp2(log)
    elif NAME == 4:
        x = tl.where(x > 0.0, x, x * 0.0)
    elif NAME == 5:
        x = 2.0 * tl.sigmoid(2.0 * x) - 1.0
    elif NAME == 6:
        x = tl.where(x > 0.0, x * x, x * 0.0)
    return x


@triton.jit
def _bias_activate(x_ptr, bias_ptr, D, NAME: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
                   PDL: tl.constexpr):  # fmt: skip
    """x = act(x + bias), in place."""
    if PDL:
        gdc_launch_dependents()
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = d < D
    bias = tl.zeros([BLOCK], tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + d, mask=ok, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    at = x_ptr + tl.program_id(0).to(tl.int64) * D + d
    x = tl.load(at, mask=ok, other=0.0).to(tl.float32) + bias
    x = activated(x, NAME)
    tl.store(at, x.to(x_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _gate_mul(x_ptr, x_row, out_ptr, D, GATE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = d < D
    gate = tl.load(x_ptr + row * x_row + d, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_row + D + d, mask=ok, other=0.0).to(tl.float32)
    gate = activated(gate, GATE)
    tl.store(out_ptr + row * D + d, (gate * up).to(out_ptr.dtype.element_ty), mask=ok)


def _launch(gate_up: Tensor, gate: int) -> Tensor:
    rows = gate_up.reshape(-1, gate_up.shape[-1])
    width = rows.shape[1] // 2
    out = torch.empty(*gate_up.shape[:-1], width, dtype=gate_up.dtype, device=gate_up.device)
    block = min(1024, triton.next_power_of_2(width))
    _gate_mul[(rows.shape[0], triton.cdiv(width, block))](
        rows, rows.stride(0), out, width, GATE=gate, BLOCK=block, **launch_options(rows.device, 4, 1)
    )
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    return _launch(gate_up, 1)


def gelu_mul(gate_up: Tensor) -> Tensor:
    return _launch(gate_up, 3)


def gelu_tanh_mul(gate_up: Tensor) -> Tensor:
    return _launch(gate_up, 2)


def bias_activate(x: Tensor, bias: Tensor | None, name: str) -> Tensor:
    assert x.is_contiguous()
    width = x.shape[-1]
    block = min(4096, triton.next_power_of_2(width))
    _bias_activate[(x.numel() // width, triton.cdiv(width, block))](
        x, x if bias is None else bias, width, NAME=ACTIVATION_CODES[name], BIAS=bias is not None, BLOCK=block,
        **launch_options(x.device, max(1, min(8, block // 512)), 1),
    )  # fmt: skip
    return x
