"""Kernels noted and compiled ahead for a GPU that is not there; prints JSON. Run it without the interpreter."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from headrace.kernels.ahead import noting


@triton.jit
def _add(x_ptr, y_ptr, N, B: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < N) + 1, mask=at < N)


@triton.jit
def _wrong(x_ptr, B: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, B), tl.dot(1, 2))  # no compiler takes this


class Hopper:
    """What Triton asks its driver for before it loads anything."""

    def launcher_cls(self, src: Any, metadata: Any) -> None:
        return None

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def entries() -> list[str]:
    """Kernels whose machine code is in the cache."""
    return sorted(file.stem for file in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin"))


def main() -> None:
    driver.set_active(Hopper())
    sizes, sums, told = (1, 5, 64), [], []
    with noting() as kernels:
        for size in (*sizes, *sizes):
            y = torch.empty(1000)
            _add[(1,)](torch.ones(1000), y, size, B=64)
            sums.append(y.abs().sum().item())
    count, before, outside = len(kernels), entries(), torch.empty(4, dtype=torch.int64).fill_(3).sum().item()
    kernels.compile(lambda done, total: told.append((done, total)))
    after = entries()
    with noting() as again:
        for size in sizes:
            _add[(1,)](torch.ones(1000), torch.empty(1000), size, B=64)
    with noting() as bad:
        _wrong[(1,)](torch.ones(64), B=64)
        _add[(1,)](torch.ones(1000), torch.empty(1000), 64, B=128)
    bad.compile()
    error = ""
    try:
        _wrong[(1,)](torch.ones(64), B=64)
    except Exception as found:
        error = type(found).__name__
    children = [p for p in Path("/proc").glob("[0-9]*") if _parent(p) == os.getpid()]
    print(
        json.dumps(
            {
                "count": count, "sums": sums, "before": before, "after": after, "told": told, "again": len(again),
                "error": error, "outside": outside, "children": len(children), "beside_the_bad": len(entries()),
            }
        )
    )  # fmt: skip


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1


if __name__ == "__main__":
    main()
