"""Which rows each program of an attention over tiles takes: worked out once a batch, for all layers.

With hundreds of sequences that search would cost as much as the attention of a tile itself.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.kernels.launch import launch_options, sequence_lanes

__all__ = ["COLUMNS", "mapped_tile", "tile_map"]

COLUMNS = 4
_TILES = 16


@triton.jit
def mapped_tile(map_ptr, tile):
    """(first row of its sequence, the sequence's new tokens, the tile's number in it, sequence) of a tile."""
    at = map_ptr + tile * 4
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit(do_not_specialize=["num_seqs", "num_tiles", "G"])
def _tile_map(starts_ptr, lens_ptr, map_ptr, num_seqs, num_tiles, G, ROWS: tl.constexpr, TILES: tl.constexpr,
              SEQS: tl.constexpr, SKIP_SINGLE: tl.constexpr, FRESH: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """See tile_map. FRESH 0: sequences without earlier keys do not count, 1: no others do, 2: all do."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    s = tl.arange(0, SEQS)
    new = tl.load(starts_ptr + s + 1, mask=s < num_seqs, other=0) - tl.load(
        starts_ptr + s, mask=s < num_seqs, other=0
    )
    if FRESH < 2:
        fresh = new == tl.load(lens_ptr + s, mask=s < num_seqs, other=0)
        new = tl.where(fresh == (FRESH == 1), new, 0)
    if SKIP_SINGLE:
        new = tl.where(new == 1, 0, new)
    tiles = (new * G + ROWS - 1) // ROWS
    ends = tl.cumsum(tiles, 0)
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    seq = tl.sum((ends[None, :] <= tile[:, None]).to(tl.int32), 1)
    real = tile < tl.max(ends, 0)
    before = tl.sum(tl.where(s[None, :] < seq[:, None], tiles[None, :], 0), 1)
    first = tl.load(starts_ptr + seq, mask=real, other=0)
    size = tl.load(starts_ptr + seq + 1, mask=real, other=0) - first
    ok = tile < num_tiles
    tl.store(map_ptr + tile * 4, first, mask=ok)
    tl.store(map_ptr + tile * 4 + 1, size, mask=ok)
    tl.store(map_ptr + tile * 4 + 2, tile - before, mask=ok)
    tl.store(map_ptr + tile * 4 + 3, seq, mask=ok)


def tile_map(
    plan: dict[object, Any] | None,
    query_starts: Tensor,
    seq_lens: Tensor,
    num_tokens: int,
    group: int,
    rows: int,
    *,
    skip_single: bool = False,
    fresh: bool | None = None,
) -> Tensor:
    """int32 [tiles, 4]: first row of a tile's sequence, its new tokens (0: no work), the tile's number in it, and it.

    Args:
        plan: of the batch; the map is made once for it. None: made here.
        query_starts: int32 [S + 1]; seq_lens: int32 [S].
        group: rows of a tile for each new token; ``rows``: of a tile.
        skip_single: sequences of one new token do not count.
        fresh: only those without (True) or with (False) earlier keys count; None: all.
    """
    key = ("tiles", group, rows, skip_single, fresh)
    found: Tensor | None = None if plan is None else plan.get(key)
    if found is None:
        num_seqs = seq_lens.shape[0]
        # The most there can be: whether sequences leave partial tiles is known on the device alone.
        count = num_tokens * group // rows + num_seqs
        found = torch.empty(count, COLUMNS, dtype=torch.int32, device=seq_lens.device)
        _tile_map[(triton.cdiv(count, _TILES),)](
            query_starts, seq_lens, found, num_seqs, count, group, ROWS=rows, TILES=_TILES,
            SEQS=sequence_lanes(num_seqs), SKIP_SINGLE=skip_single,
            FRESH=2 if fresh is None else int(fresh), **launch_options(found.device, 4, 1),
        )  # fmt: skip
        if plan is not None:
            plan[key] = found
    return found
