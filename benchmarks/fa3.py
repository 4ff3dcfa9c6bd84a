"""FlashAttention-3 as the peer ships it: the library of its published wheel, called directly, to compare with.

    pip download --no-deps vllm==0.24.0        # for torch 2.11 and CUDA 13; 279 MB, of which 11 MB are needed
    python -m benchmarks.attention --fa3 vllm-0.24.0-cp38-abi3-manylinux_2_28_x86_64.whl

``--fa3`` takes the wheel, the library in it (vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so), or that packed with xz.
"""

from __future__ import annotations

import lzma
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["load", "paged_decode", "prefill"]

_MEMBER = "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"


def load(path: str) -> None:
    """Register the library's operators. Raises OSError where it does not load."""
    source = Path(path)
    if source.suffix in (".whl", ".xz"):
        unpacked = Path(tempfile.mkdtemp()) / "fa3.so"
        with unpacked.open("wb") as target:
            if source.suffix == ".xz":
                with lzma.open(source) as packed:
                    shutil.copyfileobj(packed, target)
            else:
                with zipfile.ZipFile(source) as wheel, wheel.open(_MEMBER) as packed:
                    shutil.copyfileobj(packed, target)
        source = unpacked
    torch.ops.load_library(str(source))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, query_starts: Tensor, max_query: int, max_key: int, scale: float,
    *, key_starts: Tensor | None = None, lens: Tensor | None = None, tables: Tensor | None = None,
    metadata: Tensor | None = None, splits: int = 0,
) -> Any:  # fmt: skip
    return torch.ops._vllm_fa3_C.fwd(
        q, k, v, None, None, None, out, query_starts, key_starts, None, None, lens, max_query, max_key, tables,
        None, None, None, None, None, None, None, None, scale, True, -1, -1, 0.0, True, metadata, splits, None, 0,
        None, 1, 0, None,
    )  # fmt: skip


def prefill(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, starts: Tensor, longest: int, scale: float,
    lens: Tensor | None = None, tables: Tensor | None = None,
) -> None:  # fmt: skip
    """Causal attention of whole prompts; k and v are the batch's own, or with ``tables`` the paged cache."""
    keys = None if tables is not None else starts
    _forward(q, k, v, out, starts, longest, longest, scale, key_starts=keys, lens=lens, tables=tables)


class paged_decode:
    """One new token a sequence over the paged cache; what the peer plans once a step is planned here."""

    def __init__(
        self, q: Tensor, k: Tensor, tables: Tensor, lens: Tensor, longest: int, *, planned: bool
    ) -> None:
        self.starts = torch.arange(len(lens) + 1, dtype=torch.int32, device=q.device)
        self.tables, self.lens, self.longest = tables, lens, longest
        self.metadata = None
        if planned:
            self.metadata = torch.ops._vllm_fa3_C.get_scheduler_metadata(
                len(lens), 1, longest, q.shape[1], k.shape[2], q.shape[2], q.shape[2], q.dtype, lens, self.starts,
                None, None, None, None, k.shape[1], 0, True, -1, -1, False, 0, None, 0,
            )  # fmt: skip

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float) -> None:
        _forward(
            q, k, v, out, self.starts, 1, self.longest, scale, lens=self.lens, tables=self.tables,
            metadata=self.metadata,
        )  # fmt: skip
