"""Embeddings: replies checked, their vectors put together in one block of memory."""

from __future__ import annotations

import binascii
import contextlib
import mmap
import struct
import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import msgspec

from headrace.client.exceptions import BadReply
from headrace.client.http1 import Reply
from headrace.client.operation import Job
from headrace.client.replies import OpenAIUsage, in_order, kind_of, unreadable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["OpenAIEmbeddingData", "Vectors"]

_HUGE = 1 << 21  # bytes; blocks from here on ask for huge pages


class _Row(msgspec.Struct, gc=False):
    index: int
    embedding: tuple[float, ...] | str
    object: str = "embedding"


class _PackedRow(msgspec.Struct, gc=False):
    index: int
    embedding: Any  # numbers, base64 text, or little-endian float32 bytes
    object: str = "embedding"


class _Embeddings(msgspec.Struct, gc=False):
    data: list[_Row]
    model: str
    usage: OpenAIUsage
    object: str = "list"


class _PackedEmbeddings(msgspec.Struct, gc=False):
    data: list[_PackedRow]
    model: str
    usage: OpenAIUsage
    object: str = "list"


class _Place(msgspec.Struct):
    start: int
    end: int
    embed_dtype: str = "float32"
    endianness: str = "little"


class _Metadata(msgspec.Struct):
    usage: OpenAIUsage
    model: str = ""
    data: list[_Place] = []


_metadata = msgspec.json.Decoder(_Metadata)
_embeddings = msgspec.json.Decoder(_Embeddings)
_packed_embeddings = msgspec.msgpack.Decoder(_PackedEmbeddings)


class OpenAIEmbeddingData(msgspec.Struct, gc=False):
    """One vector.

    Attributes:
        index: position in the caller's list.
        object: ``embedding``.
    """

    index: int
    _vectors: Any  # Vectors
    _at: int
    object: str = "embedding"

    @property
    def embedding(self) -> list[float] | str:
        """The vector as a list of floats, rounded to float32; or the base64 text if asked for."""
        found: list[float] | str = self._vectors.row(self._at)
        return found

    def __repr__(self) -> str:
        return f"OpenAIEmbeddingData(index={self.index})"


class Vectors:
    """The vectors of ``count`` inputs, which come in any order and form.

    Those of the first one's kind and size lie in one block, so that ``numpy()`` of numbers copies nothing; the
    others are kept beside it.

    Args:
        count: of inputs.
        offset: position of the first in the caller's list.
    """

    def __init__(self, count: int, offset: int = 0) -> None:
        self.count, self.offset = count, offset
        self.object, self.model = "list", ""
        self.usage = OpenAIUsage(0, 0)
        self.size = -1  # bytes of a row in the table
        self.as_text = False  # the table holds base64 text, not float32
        self.table = memoryview(b"")
        self.odd: dict[int, str | bytes] = {}
        self.named: dict[int, str] = {}  # rows whose ``object`` is not "embedding"
        self._floats = struct.Struct("")

    # -- in --------------------------------------------------------------------------------------------

    def take(self, job: Job, reply: Reply) -> Reply:
        """Check one reply of ``/v1/embeddings``, and keep its vectors; the reply without its body.

        Raises BadReply unless each input of the job has exactly one vector.
        """
        kind = kind_of(reply)
        at = job.offset - self.offset
        try:
            if kind == "raw":
                decoded = _raw_floats(job, reply)
            else:
                decoded = (_embeddings if kind == "json" else _packed_embeddings).decode(reply.body)
            for row in in_order(job, decoded.data):
                # packed at once: float32 takes a quarter of JSON, and keeping JSON costs more than packing it
                self._put(at + row.index, row.embedding)
                if row.object != "embedding":
                    self.named[at + row.index] = row.object
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise error if isinstance(error, BadReply) else unreadable(reply, error) from None
        reply.body = b""
        self.add(decoded.usage)
        if not at:
            self.model, self.object = decoded.model, decoded.object
        return reply

    def add(self, usage: OpenAIUsage) -> None:
        self.usage.prompt_tokens += usage.prompt_tokens
        self.usage.total_tokens += usage.total_tokens

    def merge(self, at: int, other: Vectors) -> None:
        """Take over another's rows, from ``at`` on."""
        if other.size >= 0 and self.size < 0:
            self._begin(other.size, other.as_text)
        if (other.size, other.as_text) == (self.size, self.as_text):
            self.table[at * self.size :][: len(other.table)] = other.table
            rest: Any = other.odd
        else:
            rest = range(other.count)
        for i in rest:
            self._put(at + i, other.raw(i))
        self.named |= {at + i: name for i, name in other.named.items()}
        self.add(other.usage)
        if not at:
            self.model, self.object = other.model, other.object

    def _put(self, at: int, value: Any) -> None:
        """Numbers, base64 text, or float32 bytes. Raises ValueError."""
        if type(value) is tuple:
            size = 4 * len(value)
            if self.size < 0:
                self._begin(size, as_text=False)
            if size == self.size and not self.as_text:
                try:
                    self._floats.pack_into(self.table, at * size, *value)
                except (OverflowError, struct.error) as error:
                    raise ValueError(f"the embedding at index {at} is not float32 numbers: {error}") from None
                return
        text = type(value) is str
        if text:
            piece = value.encode("utf-8", "surrogatepass")
        else:
            piece = float32_bytes(value, at)
        if self.size < 0:
            self._begin(len(piece), text)
        if len(piece) == self.size and text == self.as_text:
            self.table[at * self.size : (at + 1) * self.size] = piece
        else:
            self.odd[at] = value if text else bytes(piece)

    def _begin(self, size: int, as_text: bool) -> None:
        self.size, self.as_text = size, as_text
        if not as_text:
            self._floats = struct.Struct(f"<{size // 4}f")
        self.table = _block(self.count * size)

    # -- out -------------------------------------------------------------------------------------------

    def raw(self, at: int) -> Any:
        """A row as base64 text, if it came as that, or as float32 bytes."""
        if at in self.odd:
            return self.odd[at]
        piece = self.table[at * self.size : (at + 1) * self.size]
        return str(piece, "utf-8", "surrogatepass") if self.as_text else piece

    def row(self, at: int) -> list[float] | str:
        raw = self.raw(at)
        return raw if isinstance(raw, str) else list(struct.unpack(f"<{len(raw) // 4}f", raw))

    def rows(self) -> list[OpenAIEmbeddingData]:
        if self.named:
            return [
                OpenAIEmbeddingData(self.offset + at, self, at, self.named.get(at, "embedding"))
                for at in range(self.count)
            ]
        return [OpenAIEmbeddingData(self.offset + at, self, at) for at in range(self.count)]

    def numpy(self) -> NDArray[np.float32]:
        """Float32 [count, width]; in the memory that the rows are in, unless they came as base64.

        Raises ValueError for several widths, and for base64 that is none.
        """
        import numpy as np

        table = self.table
        if self.odd or self.as_text:
            table = self._decoded()
        array = np.frombuffer(table, dtype="<f4").reshape(self.count, len(table) // (4 * self.count))
        return array if sys.byteorder == "little" else array.astype(np.float32)

    def _decoded(self) -> memoryview:
        """All rows as float32. A row is decoded when its turn comes, so that no second copy of all is held."""
        table, size = memoryview(b""), -1
        for i in range(self.count):
            piece = float32_bytes(self.raw(i), i)
            if size < 0:
                size = len(piece)
                table = _block(self.count * size)
            elif len(piece) != size:
                raise ValueError(
                    f"all embeddings must have the same dimension: expected {size // 4}, "
                    f"got {len(piece) // 4} at index {i}"
                )
            table[i * size : (i + 1) * size] = piece
        return table


def _block(size: int) -> memoryview:
    """Zeroed, writable memory that is used as it is filled. Raises MemoryError.

    In huge pages if it is large: a page fault for each vector was a tenth of a request's cost.
    """
    if size < _HUGE:
        return memoryview(bytearray(size))
    try:
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(
            f"there is no room for {size:,} bytes of vectors ({error}); embed_stream needs less"
        ) from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them: slower, not wrong
            block.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(block)


def _raw_floats(job: Job, reply: Reply) -> Any:
    """``application/octet-stream``: float32, little-endian, row-major; usage and model in a JSON header.

    The header is ``metadata`` (the form of vLLM's ``encoding_format: bytes``); its ``data`` list may be left
    out when all rows have one length and stand in order.
    """
    about = _metadata.decode(reply.headers.get("metadata", "{}").encode("latin-1"))
    width, over = divmod(len(reply.body), 4 * job.items)
    if over or not width:
        raise ValueError(f"{len(reply.body)} bytes are not {job.items} rows of float32")
    view = memoryview(reply.body)
    rows = [_PackedRow(i, view[i * width * 4 : (i + 1) * width * 4]) for i in range(job.items)]
    for row, entry in zip(rows, about.data):
        if entry.embed_dtype != "float32" or entry.endianness == "big":
            raise ValueError("raw embeddings must be little-endian float32")
        if [entry.start, entry.end] != [row.index * width * 4, (row.index + 1) * width * 4]:
            raise ValueError("raw embeddings must stand in order, without gaps")
    return _PackedEmbeddings(rows, about.model, about.usage)


def float32_bytes(raw: Any, index: int) -> Any:
    """Little-endian float32 bytes of one vector in any of its forms. Raises ValueError."""
    if isinstance(raw, (list, tuple)):
        try:
            return _packer(len(raw))(*raw)
        except (OverflowError, struct.error) as error:
            raise ValueError(f"the embedding at index {index} is not float32 numbers: {error}") from None
    if isinstance(raw, str):
        try:
            raw = binascii.a2b_base64(raw, strict_mode=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"the embedding at index {index} is not base64: {error}") from None
    if not isinstance(raw, (bytes, memoryview)):
        raise ValueError(f"the embedding at index {index} is {type(raw).__name__}, not a vector")
    if len(raw) % 4:
        raise ValueError(f"the embedding at index {index} has {len(raw)} bytes, not a multiple of 4")
    return raw


@lru_cache(maxsize=64)
def _packer(count: int) -> Any:
    return struct.Struct(f"<{count}f").pack  # 5 times faster than numpy.array(list)
