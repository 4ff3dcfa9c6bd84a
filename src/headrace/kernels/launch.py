"""How our Triton kernels are launched: programmatic dependent launch, and its absence.

Programmatic dependent launch (PDL): a kernel may start while its predecessor still runs. Each kernel of ours says
at once that its successor may start, touches only weights and other data that no kernel of the same graph writes,
then waits (`griddepcontrol.wait`) until its predecessor has finished. Since every kernel waits, waiting for the
predecessor is waiting for all before it.

What a kernel writes is promised only to those that have waited for it. A kernel whose results are read by later ones
before they wait (kernels/step) launches nobody early and ends with `perform_stores`.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "INTERPRETED",
    "Scratch",
    "launch_options",
    "num_multiprocessors",
    "perform_stores",
    "prefetch_l2",
    "sequence_lanes",
    "supports_gluon",
    "supports_pdl",
]

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def supports_pdl(device: torch.device) -> bool:
    """Compute capability 9.0 or later."""
    if device.type != "cuda" or INTERPRETED:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


@functools.cache
def supports_gluon(device: torch.device) -> bool:
    """Whether kernels in Gluon are used: Hopper, and the Triton that they were measured in, since Gluon is in flux."""
    if device.type != "cuda" or INTERPRETED or not triton.__version__.startswith("3.6."):
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


class Scratch:
    """Split sums and arrival counters by device: one step runs at a time on a device, and its kernels in order.

    Grown before a graph is captured (every graph runs once uncaptured first), never while one is. What was handed
    out stays: graphs captured before go on writing there. Counters are 0 between kernels.
    """

    def __init__(self) -> None:
        self.parts: dict[torch.device, list[Tensor]] = {}
        self.arrivals: dict[torch.device, list[Tensor]] = {}

    def get(self, device: torch.device, num_parts: int, num_arrivals: int) -> tuple[Tensor, Tensor]:
        """At least so many float32 and int32 values."""
        parts, arrivals = self.parts.setdefault(device, []), self.arrivals.setdefault(device, [])
        if not parts or parts[-1].numel() < num_parts:
            parts.append(torch.empty(max(num_parts, 1 << 20), dtype=torch.float32, device=device))
        if not arrivals or arrivals[-1].numel() < num_arrivals:
            arrivals.append(torch.zeros(max(num_arrivals, 4096), dtype=torch.int32, device=device))
        return parts[-1], arrivals[-1]


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Of the device; 2 under the interpreter, so that persistent loops are exercised."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def launch_options(
    device: torch.device, num_warps: int, num_stages: int, *, pdl: bool = True
) -> dict[str, Any]:
    """Keyword arguments of a launch: PDL (the kernel's own switch and the driver's), warps and stages."""
    options: dict[str, Any] = {
        "num_warps": num_warps,
        "num_stages": num_stages,
        "PDL": pdl and supports_pdl(device),
    }
    if options["PDL"]:
        options["launch_pdl"] = True
    return options


def sequence_lanes(num_seqs: int) -> int:
    """Width of a program's view of all sequences' lengths: few widths, since each is a kernel to compile."""
    for lanes in (16, 128, 256, 1024):
        if num_seqs <= lanes:
            return lanes
    return int(triton.next_power_of_2(num_seqs))


@triton.jit
def prefetch_l2(pointers):
    """Ask for the 128-byte lines at ``pointers`` to come to L2. Addresses must be mapped; order means nothing."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def perform_stores():
    """Return when all earlier stores of the calling threads can be seen on the whole device."""
    tl.inline_asm_elementwise(
        "fence.acq_rel.gpu; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )
