"""Device memory taken at start, so that serving never asks the driver for any."""

from __future__ import annotations

import torch

__all__ = ["forget_workspaces", "grow", "num_device_allocations"]

_SMALL = 1 << 20  # tensors up to this size live in segments of their own kind


def grow(size: int, device: torch.device, small: int) -> None:
    """Have torch's allocator hold ``size`` free bytes on the current stream and in the current pool.

    Args:
        small: of them, for tensors up to a MiB; the rest is one piece.
    """
    held = [torch.empty(_SMALL, dtype=torch.uint8, device=device) for _ in range(small // _SMALL)]
    if size - small > _SMALL:
        held.append(torch.empty(size - small, dtype=torch.uint8, device=device))
    del held


def num_device_allocations(device: torch.device) -> int:
    """How often the allocator has asked the driver for memory so far."""
    return int(torch.cuda.memory_stats(device)["segment.all.allocated"])


def forget_workspaces(device: torch.device) -> None:
    """Free what torch keeps for cuBLAS until the process ends, 32 MiB a stream.

    A graph's stream has its own inside the graphs' pool, whose memory could not go back to the driver otherwise when
    the graphs are gone. What runs later takes another one.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch._C._cuda_clearCublasWorkspaces()
