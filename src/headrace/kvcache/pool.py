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

    def make(heads: int, dim: int) -> torch.Tensor:
        if device.type == "cpu":
            # numpy asks the system for zeroed pages and touches none; torch.zeros writes every one (seconds a GiB).
            raw = np.zeros(num_blocks * block_size * heads * dim * dtype.itemsize, np.uint8)
            return torch.from_numpy(raw).view(dtype).view(num_blocks, block_size, heads, dim)
        return torch.zeros(num_blocks, block_size, heads, dim, dtype=dtype, device=device)

    return [LayerCache(make(heads, dim), make(heads, dim)) for heads, dim in layout]
