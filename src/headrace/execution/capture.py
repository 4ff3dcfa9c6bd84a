"""CUDA graphs: one way to capture them, one memory that they share."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from headrace.execution.device_memory import grow

__all__ = ["GraphKeeper", "GraphMemory", "borrowed"]


class GraphMemory:
    """What graphs that never run at the same time have in common: a stream that they are captured on, a pool.

    The allocator reuses memory only on the stream that it was taken for, and cuBLAS keeps a workspace for each
    stream: graphs captured on streams of their own would share nothing.
    """

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self.stream = torch.cuda.Stream(self.device)
        self.pool = torch.cuda.MemPool()
        self._graphs: list[torch.cuda.CUDAGraph] = []  # torch forgets a pool whose last graph is gone

    def grow(self, size: int, small: int) -> None:
        """Take ``size`` bytes for graphs now, ``small`` of them for tensors up to a MiB."""
        with torch.cuda.use_mem_pool(self.pool, self.device), torch.cuda.stream(self.stream):
            grow(size, self.device, small)

    def capture(self, work: Callable[[], None]) -> Callable[[], object]:
        """Run ``work`` once uncaptured, capture it, and return what replays it.

        Args:
            work: launches kernels on the current stream, asks the device nothing, and leaves its results in
                memory that it keeps alive (or borrows); it is called twice.
        """
        graph = torch.cuda.CUDAGraph()
        self._graphs.append(graph)
        current, side = torch.cuda.current_stream(self.device), self.stream
        # Compiles, and takes scratch that outlives the capture: outside the pool, where any graph may write.
        work()
        current.synchronize()
        with torch.cuda.stream(side):
            pool: Any = self.pool.id
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        current.wait_stream(side)
        return graph.replay


class _Replayed(Protocol):
    @property
    def replay(self) -> Callable[[], object]: ...


Key = TypeVar("Key", bound=Hashable)
Made = TypeVar("Made", bound=_Replayed)


class GraphKeeper(ABC, Generic[Key, Made]):
    """Whoever makes graphs when they are first needed; on a CPU the functions run that a GPU captures."""

    def __init__(self, device: torch.device) -> None:
        self._graphs: dict[Key, Made] = {}
        self._memory = GraphMemory(device) if device.type == "cuda" else None

    @abstractmethod
    def _make(self, key: Key) -> Made: ...

    def _graph(self, key: Key) -> Made:
        found = self._graphs.get(key)
        if found is None:
            found = self._graphs[key] = self._make(key)
        return found

    def reserve(self, size: int, small: int) -> None:
        """Take ``size`` bytes for all graphs together, ``small`` of them for tensors up to a MiB."""
        if self._memory is not None:
            self._memory.grow(size, small)

    def capture(self, key: Key) -> None:
        """Make this graph now, if it is not there yet."""
        with torch.inference_mode():
            graph = self._graph(key)
            if self._memory is None:
                graph.replay()

    def forget(self) -> None:
        """Let go of all graphs in a rehearsal: hundreds hold their results, which captured ones share."""
        assert self._memory is None, "captured graphs stay"
        self._graphs.clear()

    @contextlib.contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Within, graphs are not captured but run as they are, and forgotten afterwards."""
        memory, graphs = self._memory, self._graphs
        self._memory, self._graphs = None, {}
        try:
            yield
        finally:
            self._memory, self._graphs = memory, graphs


class _Lent:
    """Memory of a tensor by address, for the CUDA array interface."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": (tensor.numel() * tensor.element_size(),),
            "typestr": "|u1",
            "data": (tensor.data_ptr(), False),
            "version": 2,
        }


def borrowed(tensor: Tensor) -> Tensor:
    """The same contiguous values without keeping their memory: it is free for the graphs captured next.

    What a graph leaves there is whole until another one runs.
    """
    if tensor.device.type != "cuda":
        return tensor
    assert tensor.is_contiguous()
    raw = torch.as_tensor(_Lent(tensor), device=tensor.device)
    return raw.view(tensor.dtype).view(tensor.shape)
