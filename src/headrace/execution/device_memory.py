"""Device memory taken at start, so that serving never asks the driver for any."""

from __future__ import annotations

import torch

__all__ = ["grow", "num_device_allocations"]

_SMALL = 1 << 20  # tensors up to this size live in segments of their own kind


def grow(size: int, device: torch.device, small: int = 0) -> None:
    """Have torch's allocator hold ``size`` free bytes in one piece on the current stream and in the current pool.

    Args:
        small: bytes more for tensors up to a MiB.
    """
    held = [torch.empty(_SMALL, dtype=torch.uint8, device=device) for _ in range(-(-small // _SMALL))]
    if size > 0:
        held.append(torch.empty(max(size, _SMALL + 1), dtype=torch.uint8, device=device))
    del held


def num_device_allocations(device: torch.device) -> int:
    """How often the allocator has asked the driver for memory so far."""
    return int(torch.cuda.memory_stats(device)["segment.all.allocated"])
