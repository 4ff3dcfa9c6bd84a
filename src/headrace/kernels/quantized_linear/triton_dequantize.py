"""4-bit weights in 16 or 32 bits again, for products of many rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.quantized_linear.tiling import ROWS
from headrace.kernels.quantized_linear.triton_fragments import decode_fp4, decode_integers

__all__ = ["dequantize_codes"]

_BLOCKS = 4  # of 128 columns a program


@triton.jit
def _fp4_factors(scale_ptr, row_scale, block, G: tl.constexpr, W: tl.constexpr):
    """scale * row_scale, rounded once: float32 [W, 16, 128 / G] of the blocks ``block`` [W] of a tile; bytes."""
    PER: tl.constexpr = 64 // G
    row, group = tl.arange(0, 16), tl.arange(0, 2 * PER)
    inner = (row % 8 * PER * 4 + row // 8)[:, None] + (group % PER * 4 + group // PER * 2)[None, :]
    e = tl.load(scale_ptr + block[:, None, None] * (32 * PER) + inner[None, :, :]).to(tl.int32)
    if G == 16:
        factor = ((e * 16 + 0x7000) << 16).to(tl.float32, bitcast=True) * 2.0**-110
    else:
        factor = (tl.where(e == 0, 0x0040, tl.where(e == 255, 0x7FC0, e * 128)) << 16).to(
            tl.float32, bitcast=True
        )
    return factor * row_scale[None, :, None]


@triton.jit
def _dequantize(w_ptr, scale_ptr, zero_ptr, row_scale_ptr, groups, out_ptr, N, K, blocks, W: tl.constexpr,
                FP4: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr):  # fmt: skip
    """A tile of 16 rows, W blocks of 128 columns: float32 products of code and scales, rounded once."""
    tile = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * W
    r = tl.arange(0, 2 * W)
    block = tl.minimum(first + r % W, blocks - 1)
    w = tl.load(w_ptr + ((tile * blocks + block) * 2 + r // W)[:, None] * 128 + tl.arange(0, 128)[None, :])
    row = tl.arange(0, 16)
    each = first + tl.arange(0, W)
    cols = each[:, None] * 128 + tl.arange(0, 128)[None, :]
    rows = tile * 16 + row
    if FP4:
        one: tl.constexpr = 0x68686868 if GROUP == 16 else 0x7F7F7F7F
        value = decode_fp4(w, tl.full([W, 32], one, tl.int32), tl.float32, 1, W, GROUP, False, True)
        # chunk, i in halves with a and t between them, b
        value = value.reshape(W, 16, 2, 2, 2, 4, 2, 2).permute(0, 1, 2, 5, 3, 6, 4, 7)
        row_scale = tl.load(row_scale_ptr + tl.minimum(rows, N - 1))
        near = tile * blocks + tl.minimum(each, blocks - 1)
        factor = _fp4_factors(scale_ptr, row_scale, near, GROUP, W)
        value = value.reshape(W, 16, 128 // GROUP, GROUP) * factor[:, :, :, None]
        value = value.reshape(W, 16, 128)
    else:
        value = decode_integers(
            w,
            zero_ptr,
            tl.full([2 * W], 0, tl.int64) + tile * groups,
            first,
            groups,
            tl.float32,
            1,
            W,
            GROUP,
            ZERO,
            True,
        )
        value = value.reshape(W, 16, 2, 2, 2, 4, 2, 2).permute(0, 1, 2, 3, 5, 6, 4, 7).reshape(W, 16, 128)
        group = tile * groups + tl.minimum(cols // GROUP, groups - 1)
        value = value * tl.load(scale_ptr + group[:, None, :] * 16 + row[None, :, None])
    to = out_ptr + rows[None, :, None] * K + cols[:, None, :]
    ok = (rows < N)[None, :, None] & (cols < K)[:, None, :]
    tl.store(to, value.to(out_ptr.dtype.element_ty), mask=ok)


def dequantize_codes(
    words: Tensor,
    scale: Tensor,
    *,
    rows: int,
    columns: int,
    group: int,
    zero: Tensor | None = None,
    row_scale: Tensor | None = None,
    small: bool = False,
    dtype: torch.dtype,
) -> Tensor:
    """A TiledWeight -> [rows, columns] of ``dtype``, each number rounded once from float32."""
    tiles, blocks, fp4 = words.shape[0], words.shape[1] // 2, row_scale is not None
    assert tiles == triton.cdiv(rows, ROWS)
    out = torch.empty(rows, columns, dtype=dtype, device=words.device)
    _dequantize[(tiles, triton.cdiv(blocks, _BLOCKS))](
        words, scale.view(torch.uint8) if fp4 else scale, scale if zero is None else zero,
        scale if row_scale is None else row_scale, 1 if fp4 else scale.shape[1], out, rows, columns, blocks,
        W=_BLOCKS, FP4=fp4, GROUP=group, ZERO=zero is not None, num_warps=_BLOCKS,
    )  # fmt: skip
    return out
