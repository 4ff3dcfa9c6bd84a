"""The header of a GGUF file: metadata and tensor table. Imports no torch.

Format: GGUF versions 2 and 3, little-endian (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
Every count, length and offset is checked against the file before it is used: files come from anywhere.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headrace.errors import MissingFile, UnsupportedCheckpoint

__all__ = ["BLOCKS", "GGUFHeader", "GGUFTensor", "is_gguf", "read_header"]

# ggml type id -> (name, elements of a block, bytes of a block)
_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}

BLOCKS: dict[str, tuple[int, int]] = {name: (elements, size) for name, elements, size in _TYPES.values()}
"""ggml type name -> (elements of a block, bytes of a block)."""

# metadata value type id -> numpy type
_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
_MAX_NESTING = 4
_MIN_KV_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One entry of the tensor table.

    Attributes:
        shape: rows first (ggml writes the fastest dimension first; this is the reverse).
        type: ggml's name of the element or block type.
        offset: bytes from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """Everything before the data."""

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))


def is_gguf(path: Path) -> bool:
    """True when the file starts with GGUF's magic number."""
    try:
        with path.open("rb") as handle:
            return handle.read(4) == b"GGUF"
    except OSError:
        return False


def read_header(path: Path) -> GGUFHeader:
    """Parse and check the header.

    Raises MissingFile when there is no such file, UnsupportedCheckpoint when it is not a GGUF file of version
    2 or 3, is damaged or truncated, or uses a tensor type that is not known.
    """
    try:
        with path.open("rb") as handle:
            if path.stat().st_size < 24:
                raise UnsupportedCheckpoint(f"{path} is too short to be a GGUF file")
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                return _Reader(path, mapped).header()
    except FileNotFoundError:
        raise MissingFile(f"there is no file {path}; give the path of a .gguf file") from None


class _Reader:
    """A cursor over the file that never steps outside it."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.pos = 0

    def fail(self, why: str) -> UnsupportedCheckpoint:
        return UnsupportedCheckpoint(
            f"{self.path} is not a usable GGUF file: {why} (at byte {self.pos} of {self.size}); "
            "download or convert it again"
        )

    def take(self, count: int, what: str) -> int:
        """Step over ``count`` bytes and return where they start."""
        start = self.pos
        if count < 0 or count > self.size - start:
            raise self.fail(f"{what} wants {count} bytes and only {self.size - start} are left")
        self.pos = start + count
        return start

    def number(self, form: str, what: str) -> int:
        value: int = struct.unpack_from(form, self.data, self.take(struct.calcsize(form), what))[0]
        return value

    def string(self, what: str) -> str:
        length = self.number("<Q", what)
        start = self.take(length, what)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8") from None

    def count(self, what: str, smallest: int) -> int:
        """A number of things to come, refused if the rest of the file could not hold them."""
        number = self.number("<Q", what)
        if number > (self.size - self.pos) // smallest:
            raise self.fail(f"{what} is {number}, more than the file can hold")
        return number

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            if depth == _MAX_NESTING:
                raise self.fail(f"{key} is an array nested too deeply")
            return self.array(key, depth + 1)
        if kind not in _SCALARS:
            raise self.fail(f"{key} has the unknown value type {kind}")
        return self.scalars(kind, 1, key)[0]

    def array(self, key: str, depth: int) -> list[Any]:
        kind = self.number("<I", key)
        if kind == _STRING:
            return self.strings(self.count(f"length of {key}", 8), key)
        if kind in _SCALARS:
            return self.scalars(kind, self.count(f"length of {key}", _SCALARS[kind].itemsize), key)
        return [self.value(kind, key, depth) for _ in range(self.count(f"length of {key}", 12))]

    def scalars(self, kind: int, count: int, key: str) -> list[Any]:
        dtype = _SCALARS[kind]
        start = self.take(count * dtype.itemsize, key)
        values = np.frombuffer(self.data, dtype, count, start).copy()
        if kind == 6:  # the shortest decimal of a float32: 1e-05 instead of 9.999999747378752e-06
            return [float(str(value)) for value in values]
        return list(values.tolist())

    def strings(self, count: int, key: str) -> list[str]:
        """Vocabularies hold hundreds of thousands of strings, hence the plain loop."""
        data, size, pos = self.data, self.size, self.pos
        unpack = struct.Struct("<Q").unpack_from
        result = []
        try:
            for _ in range(count):
                start = pos + 8
                pos = start + unpack(data, pos)[0]
                if pos > size:
                    raise self.fail(f"a string of {key} reaches beyond the end of the file")
                result.append(data[start:pos].decode())
        except UnicodeDecodeError:
            raise self.fail(f"string {len(result)} of {key} is not UTF-8") from None
        except struct.error:
            raise self.fail(f"{key} is cut off") from None
        self.pos = pos
        return result

    def header(self) -> GGUFHeader:
        if self.data[:4] != b"GGUF":
            raise UnsupportedCheckpoint(f"{self.path} does not start with GGUF's magic number")
        self.pos = 4
        version = self.number("<I", "version")
        if version not in (2, 3):
            hint = ", a big-endian file" if version in (2 << 24, 3 << 24) else ""
            raise UnsupportedCheckpoint(
                f"{self.path} is GGUF version {version}{hint}; versions 2 and 3 are read"
            )
        num_tensors = self.count("number of tensors", 1)
        num_keys = self.count("number of metadata keys", _MIN_KV_BYTES)
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.string("a metadata key")
            if key in metadata:
                raise self.fail(f"metadata key {key!r} appears twice")
            metadata[key] = self.value(self.number("<I", key), key)
        self._refuse_split(metadata)
        return GGUFHeader(self.path, version, metadata, self.tensors(num_tensors, metadata))

    def _refuse_split(self, metadata: dict[str, Any]) -> None:
        parts = metadata.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            raise UnsupportedCheckpoint(
                f"{self.path} is one of {parts} parts of a split GGUF file; join them first with "
                "`llama-gguf-split --merge FIRST_PART OUTPUT`"
            )

    def tensors(self, count: int, metadata: dict[str, Any]) -> dict[str, GGUFTensor]:
        if count > (self.size - self.pos) // _MIN_TENSOR_BYTES:
            raise self.fail(f"number of tensors is {count}, more than the file can hold")
        table = [self.tensor_entry() for _ in range(count)]
        alignment = metadata.get("general.alignment", 32)
        if (
            not isinstance(alignment, int)
            or alignment < 1
            or alignment & (alignment - 1)
            or alignment > 1 << 20
        ):
            raise self.fail(f"general.alignment is {alignment!r}, not a power of two")
        start = (self.pos + alignment - 1) // alignment * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, kind, offset in table:
            if name in tensors:
                raise self.fail(f"tensor {name!r} appears twice")
            tensors[name] = self.place(name, shape, kind, start + offset, alignment)
        return tensors

    def tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string("a tensor name")
        num_dims = self.number("<I", f"dimensions of {name}")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise self.fail(f"tensor {name!r} has {num_dims} dimensions")
        dims = [self.number("<Q", f"shape of {name}") for _ in range(num_dims)]
        return name, tuple(reversed(dims)), self.number("<I", name), self.number("<Q", name)

    def place(self, name: str, shape: tuple[int, ...], kind: int, offset: int, alignment: int) -> GGUFTensor:
        """Check that the tensor lies inside the file."""
        if kind not in _TYPES:
            raise UnsupportedCheckpoint(
                f"tensor {name!r} of {self.path} has ggml type number {kind}, which is not known here; "
                f"known are {', '.join(sorted(BLOCKS))}"
            )
        type_name, elements, size = _TYPES[kind]
        if min(shape) < 1 or shape[-1] % elements:
            raise self.fail(f"tensor {name!r} has shape {list(shape)}: rows are no whole {type_name} blocks")
        nbytes = math.prod(shape) // elements * size
        if offset % alignment or nbytes > self.size or offset > self.size - nbytes:
            raise self.fail(
                f"tensor {name!r} ({nbytes} bytes at {offset}) lies outside the file; it may be truncated"
            )
        return GGUFTensor(name, shape, type_name, offset, nbytes)
