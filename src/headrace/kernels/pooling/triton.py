"""One program a sequence and slice of columns: reads its rows once, in float32, without asking the host."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.kernels.launch import launch_options

__all__ = ["segment_pool"]

_MODES = {"sum": 0, "mean": 1, "max": 2, "weighted_mean": 3}


@triton.jit
def _segment_pool(x_ptr, x_row, starts_ptr, out_ptr, D, MODE: tl.constexpr, ROWS: tl.constexpr,
                  BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    seq = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(starts_ptr + seq)
    length = tl.load(starts_ptr + seq + 1) - first
    r = tl.arange(0, ROWS)
    empty = float("-inf") if MODE == 2 else 0.0
    acc = tl.full([ROWS, BLOCK], empty, tl.float32)
    for row in range(0, length, ROWS):
        ok = (row + r < length)[:, None] & (d < D)[None, :]
        at = (first + row + r).to(tl.int64)[:, None] * x_row + d[None, :]
        x = tl.load(x_ptr + at, mask=ok, other=empty).to(tl.float32)
        if MODE == 2:
            acc = tl.where((acc > x) | (acc != acc), acc, x)  # NaN stays, as in torch
        elif MODE == 3:
            acc += x * (row + r + 1).to(tl.float32)[:, None]
        else:
            acc += x
    if MODE == 2:
        nan = tl.max((acc != acc).to(tl.int32), 0) > 0
        y = tl.where(nan, float("nan"), tl.max(acc, 0))
    else:
        y = tl.sum(acc, 0)
    count = tl.maximum(length, 1).to(tl.float32)
    if MODE == 1:
        y = y / count
    elif MODE == 3:
        y = y / (count * (count + 1.0) * 0.5)
    tl.store(out_ptr + seq.to(tl.int64) * D + d, y, mask=d < D)


def segment_pool(values: Tensor, starts: Tensor, mode: str) -> Tensor:
    assert values.stride(1) == 1
    num_seqs, dim = starts.shape[0] - 1, values.shape[1]
    out = torch.empty(num_seqs, dim, dtype=torch.float32, device=values.device)
    block = min(128, triton.next_power_of_2(dim))
    _segment_pool[(num_seqs, triton.cdiv(dim, block))](
        values, values.stride(0), starts, out, dim, MODE=_MODES[mode], ROWS=16, BLOCK=block,
        **launch_options(values.device, 4, 2),
    )  # fmt: skip
    return out
