"""Large products with what follows them done before they are written: bias and activation, or a gate.

Tiles are loaded by the tensor memory accelerator through descriptors; a program takes tiles one after another
(persistent), so that the loads of the next tile run while this one is finished and written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from headrace.kernels.launch import INTERPRETED, num_multiprocessors

__all__ = ["Shape", "fused_product"]

_NAMES = {None: 0, "silu": 1, "gelu_tanh": 2, "gelu": 3, "relu": 4, "tanh": 5}
Shape = tuple[
    int, int, int, int, int, int, int
]  # rows, columns, depth of a tile, group, programs an SM, warps, stages


@triton.jit
def _activated(x, NAME: tl.constexpr):
    if NAME == 1:
        x = x * tl.sigmoid(x)
    elif NAME == 2:
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif NAME == 3:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == 4:
        x = tl.where(x > 0.0, x, x * 0.0)
    elif NAME == 5:
        x = 2.0 * tl.sigmoid(2.0 * x) - 1.0
    return x


@triton.jit
def _product(x_desc, w_desc, out_desc, bias_ptr, M, N, K, PROGRAMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
             BK: tl.constexpr, GROUP: tl.constexpr, NAME: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr,
             FLATTEN: tl.constexpr):  # fmt: skip
    """out = act(x @ w.T + bias); SPLIT writes a tile in two halves, which takes half the shared memory."""
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=FLATTEN):
        first = tile // (GROUP * tiles_n) * GROUP
        rows = tl.minimum(tiles_m - first, GROUP)
        within = tile % (GROUP * tiles_n)
        m = (first + within % rows) * BM
        n = (within // rows) * BN
        acc = tl.zeros([BM, BN], tl.float32)
        for k in range(0, K, BK):
            acc = tl.dot(x_desc.load([m, k]), w_desc.load([n, k]).T, acc)
        if SPLIT:
            left, right = tl.split(tl.permute(tl.reshape(acc, [BM, 2, BN // 2]), [0, 2, 1]))
            if BIAS:
                at = n + tl.arange(0, BN // 2)
                left += tl.load(bias_ptr + at, mask=at < N, other=0.0).to(tl.float32)[None, :]
                at += BN // 2
                right += tl.load(bias_ptr + at, mask=at < N, other=0.0).to(tl.float32)[None, :]
            out_desc.store([m, n], _activated(left, NAME).to(out_desc.dtype))
            out_desc.store([m, n + BN // 2], _activated(right, NAME).to(out_desc.dtype))
        else:
            if BIAS:
                at = n + tl.arange(0, BN)
                acc += tl.load(bias_ptr + at, mask=at < N, other=0.0).to(tl.float32)[None, :]
            out_desc.store([m, n], _activated(acc, NAME).to(out_desc.dtype))


def fused_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    *,
    shape: Shape | None = None,
    split: bool = True,
    flatten: bool = True,
) -> Tensor:
    """``activation(x @ weight.T + bias)``, x [M, K], weight [N, K], both with rows of a multiple of 16 bytes."""
    rows, inner = x.shape
    columns = weight.shape[0]
    bm, bn, bk, group, per_sm, warps, stages = shape or _shape()
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    tiles = triton.cdiv(rows, bm) * triton.cdiv(columns, bn)
    programs = min(tiles, num_multiprocessors(x.device) * per_sm)
    _product[(programs,)](
        TensorDescriptor.from_tensor(x, [bm, bk]),
        TensorDescriptor.from_tensor(weight, [bn, bk]),
        TensorDescriptor.from_tensor(out, [bm, bn // 2 if split else bn]),
        weight if bias is None else bias, rows, columns, inner, PROGRAMS=programs, BM=bm, BN=bn, BK=bk, GROUP=group,
        NAME=_NAMES[activation], BIAS=bias is not None, SPLIT=split, FLATTEN=flatten, num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    return out


def _shape() -> Shape:
    return (16, 32, 16, 4, 1, 4, 1) if INTERPRETED else (128, 256, 64, 8, 1, 8, 3)
