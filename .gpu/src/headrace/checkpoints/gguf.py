"""A checkpoint in one GGUF file, read through a memory map."""

from __future__ import annotations

import mmap
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.checkpoints.base import PackedTensor, TensorInfo, fingerprint_files
from headrace.checkpoints.gguf_blocks import DEQUANTIZABLE, dequantize
from headrace.checkpoints.gguf_config import generation_config, hf_config
from headrace.checkpoints.gguf_header import BLOCKS, GGUFTensor, read_header
from headrace.checkpoints.gguf_names import Stored, stored_tensors
from headrace.errors import MissingFile, UnsupportedCheckpoint, nearest

if TYPE_CHECKING:
    import torch

__all__ = ["GGUFCheckpoint"]

_MAX_FACTORS = 4096
_PLAIN = ("F32", "F16", "BF16", "F64")


class GGUFCheckpoint:
    """Implements Checkpoint over one GGUF file; quantized tensors stay packed until they are loaded.

    Attributes:
        header: the parsed header, for whoever builds the tokenizer.

    Raises UnsupportedCheckpoint for a damaged file or an unreadable tensor type, UnknownArchitecture for a
    model that is not served from GGUF. Both before any weight is read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_header(path)
        with path.open("rb") as handle:
            # Copy-on-write: PyTorch wants writable memory, and the file must stay as it is.
            self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        self.config: dict[str, Any] = hf_config(self.header, self._factors)
        self.generation_config: dict[str, Any] = generation_config(self.header)
        self._stored = stored_tensors(self.header, self.config)
        for name, stored in self._stored.items():
            if stored.tensor.type not in DEQUANTIZABLE and stored.tensor.type not in _PLAIN:
                raise UnsupportedCheckpoint(
                    f"{path}: tensor {name!r} is of ggml type {stored.tensor.type}, which cannot be read; "
                    f"supported are {', '.join((*_PLAIN, *sorted(DEQUANTIZABLE)))}. "
                    "Take another quantization of this model"
                )

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint_files([self.path])

    def names(self) -> list[str]:
        return list(self._stored)

    def info(self, name: str) -> TensorInfo:
        tensor = self._find(name).tensor
        return TensorInfo(tensor.shape, tensor.type, tensor.nbytes)

    def load(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        stored = self._find(name)
        tensor = stored.tensor
        if tensor.type in _PLAIN:
            value = self._plain(tensor)
        else:
            packed = self._packed(stored)
            return dequantize(packed, tensor.type, dtype).view(tensor.shape)
        if stored.interleaved_heads:
            value = value[_row_order(value.shape[0], stored.interleaved_heads)]
        if stored.shift:
            value = value - stored.shift
        return value if dtype is None else value.to(dtype)

    def load_packed(self, name: str) -> PackedTensor:
        """A quantized matrix as it is stored, rows in Hugging Face's order.

        Raises UnsupportedCheckpoint when the tensor is not stored in blocks.
        """
        stored = self._find(name)
        if stored.tensor.type in _PLAIN or stored.shift:
            raise UnsupportedCheckpoint(
                f"{self.path}: tensor {name!r} is stored as {stored.tensor.type}, not in blocks"
            )
        return PackedTensor(stored.tensor.type, self._packed(stored), stored.tensor.shape)

    def _find(self, name: str) -> Stored:
        stored = self._stored.get(name)
        if stored is None:
            raise MissingFile(f"{self.path} holds no tensor {name!r}{nearest(name, self._stored)}")
        return stored

    def _bytes(self, tensor: GGUFTensor) -> torch.Tensor:
        import torch

        return torch.frombuffer(self._map, dtype=torch.uint8, count=tensor.nbytes, offset=tensor.offset)

    def _plain(self, tensor: GGUFTensor) -> torch.Tensor:
        import torch

        dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
        return self._bytes(tensor).view(dtypes[tensor.type]).view(tensor.shape)

    def _packed(self, stored: Stored) -> torch.Tensor:
        """uint8 [rows, bytes_per_row]; a shifted tensor is never stored in blocks."""
        tensor = stored.tensor
        if stored.shift:
            raise UnsupportedCheckpoint(
                f"{self.path}: norm {tensor.name!r} is quantized, which no converter does"
            )
        elements, size = BLOCKS[tensor.type]
        raw = self._bytes(tensor).view(-1, tensor.shape[-1] // elements * size)
        if stored.interleaved_heads:
            raw = raw[_row_order(raw.shape[0], stored.interleaved_heads)]
        return raw

    def _factors(self, name: str) -> list[float]:
        tensor = self.header.tensors[name]
        if tensor.type != "F32" or len(tensor.shape) != 1 or tensor.shape[0] > _MAX_FACTORS:
            raise UnsupportedCheckpoint(
                f"{self.path}: {name} is {tensor.type} {list(tensor.shape)}, no list of factors"
            )
        view = memoryview(self._map)[tensor.offset : tensor.offset + tensor.nbytes].cast("f")
        return [float(value) for value in view]


def _row_order(rows: int, heads: int) -> torch.Tensor:
    """Where each row of the halves layout lies in the interleaved one: int64 [rows].

    Within a head of D rows, llama.cpp stores row i of the first half at 2i and of the second half at 2i + 1.
    """
    import torch

    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).reshape(-1)
