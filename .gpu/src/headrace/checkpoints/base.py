"""What a checkpoint is to everything above: names, shapes and lazily loaded tensors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "PackedTensor", "TensorInfo", "fingerprint_files"]

_SAMPLES = 64
_SAMPLE_BYTES = 4096
_HEAD_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as it lies on disk.

    Attributes:
        shape: as PyTorch sees it, rows first.
        dtype: safetensors' name (``F32``, ``BF16``, ``F8_E4M3``...) or ggml's (``Q4_K``...).
        nbytes: on disk.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A quantized matrix, blocks as ggml stores them.

    Attributes:
        ggml_type: ``Q4_K``, ``Q8_0``...
        raw: uint8 [rows, bytes_per_row], a view of the file's memory map where no row had to move.
        shape: logical [rows, columns].
    """

    ggml_type: str
    raw: torch.Tensor
    shape: tuple[int, ...]


class Checkpoint(Protocol):
    """Weights and configuration on disk. Opening one reads headers only.

    Attributes:
        path: folder or file.
        config: as ``config.json`` has it (for GGUF translated from its metadata).
        generation_config: as ``generation_config.json`` has it; empty when there is none.
    """

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]

    def names(self) -> list[str]:
        """Tensor names as Hugging Face spells them."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Shape, type and size without reading data. Raises MissingFile for an unknown name."""
        ...

    def load(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor on the CPU, dequantized if stored in blocks (float32 unless ``dtype`` is given).

        Without a cast the result may be a view of a private memory map: treat it as read-only.
        """
        ...

    @property
    def fingerprint(self) -> str:
        """32 hex digits that follow the content, for cache keys."""
        ...


def fingerprint_files(files: Iterable[Path]) -> str:
    """Content id of weight files from their names, sizes, heads and evenly spread samples.

    Reads at most 320 KiB a file, so it is cheap, and it does not see dates or folders. It tells checkpoints
    apart; it is no proof against somebody who alters bytes on purpose.
    """
    digest = hashlib.sha256(b"headrace-checkpoint-1")
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb", buffering=0) as handle:
            digest.update(os.pread(handle.fileno(), _HEAD_BYTES, 0))
            if size > _HEAD_BYTES:
                step = max((size - _SAMPLE_BYTES) // _SAMPLES, 1)
                for index in range(1, _SAMPLES + 1):
                    digest.update(os.pread(handle.fileno(), _SAMPLE_BYTES, min(index * step, size - 1)))
    return digest.hexdigest()[:32]
