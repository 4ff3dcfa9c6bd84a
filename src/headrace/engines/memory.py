"""How much memory a core takes, decided once, before the first request."""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import Protocol

import torch

from headrace.config.plan.facts import Facts
from headrace.config.plan.memory import CPU_POOL_BYTES, CPU_POOL_SHARE, CUDA_PROCESS_BYTES, MIB, pool_blocks
from headrace.config.plan.scratch import SMALL_BYTES, Scratch
from headrace.config.plan.shape import ModelShape
from headrace.config.plan.weights import weigh
from headrace.config.spec import EngineSpec
from headrace.errors import DoesNotFit
from headrace.execution.device_memory import grow
from headrace.kernels.attention.cache import cache_width

__all__ = [
    "available_bytes",
    "give_back",
    "kv_block_bytes",
    "num_kv_blocks",
    "steady_heap",
    "take_for_steps",
    "take_for_weights",
]


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGE_BLOCK = 4 * MIB  # whose pages cost less to take anew than what is computed in them


class Reserving(Protocol):
    """Graphs that share memory."""

    def reserve(self, size: int, small: int) -> None:
        """Take ``size`` bytes, ``small`` of them for tensors up to a MiB."""


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be taken on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + _page_cache_bytes()


def _page_cache_bytes() -> int:
    """Memory that Linux would give back: file pages count as free."""
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return max(0, int(fields["MemAvailable"].split()[0]) - int(fields["MemFree"].split()[0])) * 1024
    except (OSError, KeyError, ValueError):
        return 0


def kv_block_bytes(layout: list[tuple[int, int]], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers.

    Args:
        layout: (num_kv_heads, head_dim) of each layer.
    """
    return sum(2 * heads * cache_width(dim, dtype) for heads, dim in layout) * block_size * dtype.itemsize


def take_for_weights(device: torch.device, facts: Facts, shape: ModelShape, dtype: torch.dtype) -> None:
    """Take the bytes of weights that are loaded as they are in one piece: tensors of their own are rounded up."""
    if device.type == "cuda":
        grow(weigh(facts, shape, dtype.itemsize, "").total, device, 0)


def give_back(device: torch.device) -> None:
    """What loading left over: torch's cache of a GPU, or on a CPU what the C library keeps for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    with contextlib.suppress(OSError, AttributeError):  # not glibc: nothing is known to be kept
        ctypes.CDLL(None).malloc_trim(0)


def steady_heap() -> None:
    """Have the C library take large blocks from the system one by one, and give them back, where it is glibc.

    It would otherwise learn from the first large blocks that are freed to keep such in its heap; between small ones
    that live on, the heap then grows by chance: use differed by 6% from run to run of one server.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        for parameter, size in ((_M_MMAP_THRESHOLD, _LARGE_BLOCK), (_M_TRIM_THRESHOLD, 8 * _LARGE_BLOCK)):
            library.mallopt(parameter, size)


def take_for_steps(device: torch.device, need: Scratch, graphs: Reserving | None) -> None:
    """Take what steps will need, when all that lives as long as the server is there."""
    if device.type == "cuda":
        grow(need.plain, device, SMALL_BYTES)
        if graphs is not None:
            graphs.reserve(need.pooled, SMALL_BYTES)


def num_kv_blocks(
    spec: EngineSpec, block_bytes: int, max_model_len: int, device: torch.device, need: Scratch
) -> int:
    """Blocks of the pool, the null block included; on a GPU of what is truly free once the weights are there.

    Args:
        max_model_len: the pool never needs more than max_num_seqs sequences of this length.
        need: what steps will take of the rest.

    Raises:
        DoesNotFit: not even one block a sequence fits.
    """
    if spec.kv_cache_bytes is not None:
        budget = spec.kv_cache_bytes
    elif device.type == "cpu":
        budget = min(CPU_POOL_BYTES, int(available_bytes(device) * CPU_POOL_SHARE))
    else:
        total = torch.cuda.get_device_properties(device).total_memory
        used = total - available_bytes(device)
        process = used - torch.cuda.memory_reserved(device)
        steps = need.state + need.plain + need.pooled + need.objects
        later = steps + max(0, CUDA_PROCESS_BYTES - process)
        budget = int(total * spec.memory_fraction) - used - later
    blocks = pool_blocks(
        budget,
        block_bytes,
        max_num_seqs=spec.max_num_seqs,
        context=max_model_len,
        block_size=spec.block_size,
    )
    if blocks < 2:
        raise DoesNotFit(
            f"the KV cache of {spec.name!r} needs at least {2 * block_bytes / 2**20:.1f} MiB and "
            f"{max(budget, 0) / 2**20:.1f} MiB are left; lower max_model_len or the weights' precision, "
            "or raise memory_fraction or kv_cache_bytes",
            param="kv_cache_bytes",
        )
    return blocks
