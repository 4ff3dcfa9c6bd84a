"""One way to make a CUDA graph of a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["capture"]


def capture(work: Callable[[], None], device: torch.device, pool: Any) -> Callable[[], object]:
    """Run ``work`` once uncaptured, capture it, and return what replays it.

    Args:
        work: launches kernels on the current stream, asks the device nothing, and leaves its results in memory
            that it keeps alive; it is called twice.
        pool: of `torch.cuda.graph_pool_handle`, shared by graphs that never run at the same time.
    """
    graph = torch.cuda.CUDAGraph()
    current = torch.cuda.current_stream(device)
    side = torch.cuda.Stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        work()  # compiles, and takes scratch that must outlive the capture
        side.synchronize()
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
    current.wait_stream(side)
    return graph.replay
