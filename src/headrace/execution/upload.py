"""Many small arrays to the device in one transfer that nobody waits for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["upload"]

_TYPES = {"i": torch.int32, "f": torch.float32}


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Copies of arrays of int32 and float32, of the same shapes, each aligned to 16 bytes.

    (Triton compiles a kernel anew for pointers of another alignment.)
    """
    starts = [0, *itertools.accumulate(-(-array.size // 4) * 4 for array in arrays)]
    # Pinned memory comes from torch's cache, which keeps it until the copy is done.
    host = torch.empty(starts[-1], dtype=torch.int32, pin_memory=device.type == "cuda")
    flat = host.numpy()
    for at, array in zip(starts, arrays):
        assert array.itemsize == 4 and array.dtype.kind in _TYPES
        flat[at : at + array.size] = array.reshape(-1).view(np.int32)
    copied = host.to(device, non_blocking=True)
    return [
        copied[at : at + array.size].view(_TYPES[array.dtype.kind]).view(array.shape)
        for at, array in zip(starts, arrays)
    ]
