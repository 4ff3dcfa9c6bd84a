"""Captured work, again and again."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["always_the_same"]


def always_the_same(work: Callable[[], torch.Tensor], times: int = 50) -> torch.Tensor:
    """What the work gives, also as a CUDA graph and so many times."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        first = work()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        captured = work()
        graph.capture_end()
        for _ in range(times):
            captured.fill_(torch.nan)
            graph.replay()
            stream.synchronize()
            assert torch.equal(captured, first)
    return first
