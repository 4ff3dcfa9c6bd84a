"""The tensors of the paged KV cache."""

from __future__ import annotations

import numpy as np
import torch

from headrace.layers.packed import LayerCache

__all__ = ["allocate_caches"]


def allocate_caches(
    layout: list[tuple[int, int]], num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[LayerCache]:
    """Keys and values of every layer, zeroed (on a CPU pages are taken when first written).

    Args:
        layout: (num_kv_heads, head_dim) of each layer.
        num_blocks: the null block included.
    """

    sizes = [num_blocks * block_size * heads * dim for heads, dim in layout]
    if device.type == "cpu":
        # numpy asks the system for zeroed pages and touches none; torch.zeros writes every one (seconds a GiB).
        total = 2 * sum(sizes) * dtype.itemsize
        whole = torch.from_numpy(np.zeros(total, np.uint8)).view(dtype)
    else:
        whole = torch.zeros(2 * sum(sizes), dtype=dtype, device=device)  # in one piece: nothing is rounded up
    parts = iter(whole.split([size for size in sizes for _ in range(2)]))
    shapes = [(num_blocks, block_size, heads, dim) for heads, dim in layout]
    return [LayerCache(next(parts).view(shape), next(parts).view(shape)) for shape in shapes]
