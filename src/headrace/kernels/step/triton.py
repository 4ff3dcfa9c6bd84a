"""Both ends of a decode step, one kernel each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.kernels.launch import INTERPRETED, launch_options, perform_stores, supports_pdl
from headrace.kernels.step import StepInputs

__all__ = ["argmax_rows", "begin_step", "reduce_best"]


@triton.jit
def _begin_step(packed_ptr, tables_ptr, table_row, last_ptr, embed_ptr, out_ptr, tokens_ptr, positions_ptr, slots_ptr,
                lens_ptr, log_ptr, B, D, scale, BLOCK: tl.constexpr, LOG: tl.constexpr, CHUNK: tl.constexpr,
                SCALED: tl.constexpr, FENCE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    # No early launch of dependents here, and a fence at the end: what this kernel writes may be read by all after it
    # without waiting.
    i = tl.program_id(0)
    row = tl.load(packed_ptr + i).to(tl.int64)
    position = tl.load(packed_ptr + B + i)
    token = tl.load(packed_ptr + 2 * B + i).to(tl.int64)
    new = tl.load(packed_ptr + 3 * B + i)
    table = tables_ptr + row * table_row
    block = tl.load(table + position // BLOCK)
    if new >= 0:
        tl.store(table + position // BLOCK, new)
        block = new
    if new < -1:
        tl.store(table + position // BLOCK + 1, -2 - new)
    if token < 0:
        token = tl.load(last_ptr + row)
    if LOG > 0:
        tl.store(log_ptr + i * LOG + position % LOG, token)
    token = tl.maximum(token, 0)
    tl.store(packed_ptr + B + i, position + 1)
    tl.store(packed_ptr + 2 * B + i, -1)
    tl.store(packed_ptr + 3 * B + i, -1)
    tl.store(tokens_ptr + i, token)
    tl.store(positions_ptr + i, position.to(tl.int64))
    tl.store(slots_ptr + i, block.to(tl.int64) * BLOCK + position % BLOCK)
    tl.store(lens_ptr + i, position + 1)
    d = tl.arange(0, CHUNK)
    for start in range(0, D, CHUNK):
        ok = start + d < D
        x = tl.load(embed_ptr + token * D + start + d, mask=ok, other=0.0)
        if SCALED:
            x = (x.to(tl.float32) * scale).to(x.dtype)
        tl.store(out_ptr + i.to(tl.int64) * D + start + d, x, mask=ok)
    if FENCE:
        perform_stores()


def begin_step(
    packed: Tensor,
    tables: Tensor,
    last_tokens: Tensor,
    embedding: Tensor | None,
    scale: float,
    block_size: int,
    log: Tensor | None = None,
) -> StepInputs:
    device, num = packed.device, packed.shape[1]
    table = packed if embedding is None else embedding
    width = 0 if embedding is None else table.shape[1]
    embedded = torch.empty(num, width, dtype=table.dtype, device=device)
    tokens, positions, slots = (torch.empty(num, dtype=torch.int64, device=device) for _ in range(3))
    lens = torch.empty(num, dtype=torch.int32, device=device)
    _begin_step[(num,)](
        packed, tables, tables.stride(0), last_tokens, table, embedded, tokens, positions, slots, lens,
        last_tokens if log is None else log, num, width, scale, BLOCK=block_size,
        LOG=0 if log is None else log.shape[1], CHUNK=1024, SCALED=scale != 1.0, FENCE=supports_pdl(device),
        **launch_options(device, 4, 1, pdl=False),
    )  # fmt: skip
    return StepInputs(embedded, tokens, positions, slots, lens)


@triton.jit
def _best(values_ptr, row_stride, indices_ptr, tokens_ptr, last_ptr, rows_ptr, N, BLOCK: tl.constexpr,
          INDEXED: tl.constexpr, KEEP: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """The largest of N values, the lowest index among equals; -1 if it is not finite. KEEP: remember it by row."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    best = tl.full([BLOCK], 2147483647, tl.int32)
    for start in range(0, N, BLOCK):
        ok = start + i < N
        value = tl.load(values_ptr + row * row_stride + start + i, mask=ok, other=float("-inf")).to(
            tl.float32
        )
        value = tl.where((value != value), float("inf"), value)
        index = start + i
        if INDEXED:
            index = tl.load(indices_ptr + row * row_stride + start + i, mask=ok, other=2147483647)
        best = tl.where(value > top, index, best)
        top = tl.maximum(top, value)
    peak = tl.max(top, 0)
    token = tl.min(tl.where(top == peak, best, 2147483647), 0)
    finite = (peak < float("inf")) & (peak > float("-inf"))
    token = tl.where(finite, token, -1).to(tl.int64)
    tl.store(tokens_ptr + row, token)
    if KEEP:
        tl.store(last_ptr + tl.load(rows_ptr + row), token)


def reduce_best(
    values: Tensor,
    indices: Tensor | None,
    *,
    last_tokens: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Index of the largest of values [P, N] in each row, or what ``indices`` [P, N] has there; -1: not finite.

    With ``last_tokens`` int64 [R] and ``rows`` int32 [P] it is also written to last_tokens[rows].
    """
    num, width = values.shape
    assert values.stride(1) == 1 and (indices is None or indices.stride() == values.stride())
    out = torch.empty(num, dtype=torch.int64, device=values.device)
    block = 32 if INTERPRETED else min(4096, triton.next_power_of_2(width))
    _best[(num,)](
        values, values.stride(0), values if indices is None else indices, out,
        out if last_tokens is None else last_tokens, out if rows is None else rows, width, BLOCK=block,
        INDEXED=indices is not None, KEEP=last_tokens is not None, **launch_options(values.device, 8, 1),
    )  # fmt: skip
    return out


def argmax_rows(logits: Tensor) -> Tensor:
    return reduce_best(logits, None)
