"""Many small arrays to the device in one transfer that nobody waits for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["upload"]

_TYPES = {"i": torch.int32, "f": torch.float32}


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Copies of arrays of int32 and float32, of the same shapes."""
    total = sum(array.size for array in arrays)
    # Pinned memory comes from torch's cache, which keeps it until the copy is done.
    host = torch.empty(total, dtype=torch.int32, pin_memory=device.type == "cuda")
    flat, at = host.numpy(), 0
    for array in arrays:
        assert array.itemsize == 4 and array.dtype.kind in _TYPES
        flat[at : at + array.size] = array.reshape(-1).view(np.int32)
        at += array.size
    pieces = host.to(device, non_blocking=True).split([array.size for array in arrays])
    return [piece.view(_TYPES[array.dtype.kind]).view(array.shape) for piece, array in zip(pieces, arrays)]
