"""Weights from files to a GPU, as fast as both allow: several threads read pinned pieces, which the device fetches.

A copy straight from a memory map faults its pages in one by one, and goes through the driver's own small buffer.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from headrace.errors import UnsupportedCheckpoint

if TYPE_CHECKING:
    import torch

__all__ = ["InFiles", "Region", "Upload", "Uploader", "uploader_for"]

_PIECE = 8 << 20  # bytes; a multiple of every element's size
_PIECES = 16
_THREADS = 8


@dataclass(frozen=True, slots=True)
class Region:
    """Where a tensor's data lies: row-major, little-endian, in one piece."""

    file: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@runtime_checkable
class InFiles(Protocol):
    """A checkpoint that says where its tensors lie."""

    def region(self, name: str) -> Region | None:
        """None for those that only it can read."""
        ...


@dataclass(frozen=True, slots=True)
class Upload:
    """What is to be copied where.

    Attributes:
        destination: contiguous, on a GPU, of as many elements; another type is cast to on the device.
        done: called when the copy is queued.
    """

    region: Region
    destination: torch.Tensor
    done: Callable[[], None]


class Uploader:
    """Threads and pinned memory for as many uploads as there are; close it when all weights are there."""

    def __init__(self, device: torch.device) -> None:
        self._slots = deque(_Slot(device) for _ in range(_PIECES))
        self._readers = ThreadPoolExecutor(_THREADS, thread_name_prefix="weights")
        self._files: dict[Path, int] = {}
        self._under_way: deque[tuple[Future[None], _Slot, _Piece]] = deque()

    def add(self, upload: Upload) -> None:
        """Begin to read it; its copy and those before are queued, in order, on the current stream.

        Raises UnsupportedCheckpoint for a file that ends too early, OSError when it cannot be read.
        """
        for piece in _pieces(upload):
            if not self._slots:
                self._finish_one()
            slot = self._slots.popleft()
            slot.wait()
            reading = self._readers.submit(slot.read, self._file(upload.region.file), piece)
            self._under_way.append((reading, slot, piece))

    def flush(self) -> None:
        """Until all copies are queued."""
        while self._under_way:
            self._finish_one()

    def _finish_one(self) -> None:
        reading, slot, piece = self._under_way.popleft()
        reading.result()
        slot.copy(piece)
        self._slots.append(slot)

    def close(self) -> None:
        """Wait until nothing is read any more, and the device has what was queued."""
        self._readers.shutdown(cancel_futures=True)
        for slot in self._slots:
            slot.wait()
        for file in self._files.values():
            os.close(file)

    def _file(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]


def uploader_for(weights: object, device: torch.device) -> Uploader | None:
    """One for weights that say where they lie and a device that fetches by itself; None for others."""
    return Uploader(device) if device.type == "cuda" and isinstance(weights, InFiles) else None


@dataclass(frozen=True, slots=True)
class _Piece:
    upload: Upload
    begin: int  # byte within the tensor
    nbytes: int

    @property
    def last(self) -> bool:
        return self.begin + self.nbytes == self.upload.region.nbytes


def _pieces(upload: Upload) -> Iterator[_Piece]:
    whole = upload.region.nbytes
    for begin in range(0, whole, _PIECE):
        yield _Piece(upload, begin, min(_PIECE, whole - begin))


class _Slot:
    """Memory that a thread reads into and the device fetches from: pinned, where there is a device."""

    def __init__(self, device: torch.device) -> None:
        import torch

        cuda = device.type == "cuda"
        self.memory = torch.empty(_PIECE, dtype=torch.uint8, pin_memory=cuda)
        self._fetched = torch.cuda.Event() if cuda else None

    def wait(self) -> None:
        """Until the device has what was copied last."""
        if self._fetched is not None:
            self._fetched.synchronize()

    def read(self, file: int, piece: _Piece) -> None:
        """In a thread; the reading is outside Python's lock."""
        view: Any = memoryview(self.memory.numpy())[: piece.nbytes]  # type: ignore[arg-type]
        at, region = piece.upload.region.offset + piece.begin, piece.upload.region
        while view:
            count = os.preadv(file, [view], at)
            if count == 0:
                raise UnsupportedCheckpoint(f"{region.file} ended at {at} bytes; download it again")
            view, at = view[count:], at + count

    def copy(self, piece: _Piece) -> None:
        """Queue the copy of what was read."""
        region, destination = piece.upload.region, piece.upload.destination
        size = region.dtype.itemsize
        target = destination.view(-1)[piece.begin // size : (piece.begin + piece.nbytes) // size]
        given = self.memory[: piece.nbytes].view(region.dtype)
        if target.dtype != region.dtype:
            given = given.to(target.device, non_blocking=True)
        target.copy_(given, non_blocking=True)
        if self._fetched is not None:
            self._fetched.record()
        if piece.last:
            piece.upload.done()
