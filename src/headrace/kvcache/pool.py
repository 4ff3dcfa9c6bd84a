"""The tensors of the paged KV cache."""

from __future__ import annotations

import math

import numpy as np
import torch

from headrace.kernels.attention.cache import cache_width
from headrace.kernels.attention.fp4 import FP4
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

    shapes = [(num_blocks, block_size, heads, cache_width(dim, dtype)) for heads, dim in layout]
    sizes = [math.prod(shape) for shape in shapes]
    if device.type == "cpu":
        # numpy asks the system for zeroed pages and touches none; torch.zeros writes every one (seconds a GiB).
        total = 2 * sum(sizes) * dtype.itemsize
        whole = torch.from_numpy(np.zeros(total, np.uint8)).view(dtype)
    else:
        kind = torch.uint8 if dtype is FP4 else dtype
        whole = torch.zeros(2 * sum(sizes), dtype=kind, device=device)  # in one piece: nothing is rounded up
        whole = whole.view(dtype)
    parts = iter(whole.split([size for size in sizes for _ in range(2)]))
    return [LayerCache(next(parts).view(shape), next(parts).view(shape)) for shape in shapes]
