"""Replies, checked and joined: what the methods of the client return."""

from __future__ import annotations

import binascii
import itertools
import struct
import sys
from collections.abc import Iterator
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import msgspec

from headrace.client.exceptions import BadReply
from headrace.client.http1 import Reply
from headrace.client.operation import Job

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "BatchPostResponse",
    "ClassificationResponse",
    "ClassificationResult",
    "OpenAIEmbeddingData",
    "OpenAIEmbeddingsResponse",
    "OpenAIUsage",
    "RerankResponse",
    "RerankResult",
]


class OpenAIUsage(msgspec.Struct, gc=False):
    """Tokens, summed over the requests of an operation."""

    prompt_tokens: int
    total_tokens: int


class RerankResult(msgspec.Struct, gc=False):
    """The score of the text at ``index`` of the caller's list."""

    index: int
    score: float
    text: str | None = None


class ClassificationResult(msgspec.Struct, gc=False):
    """One label and its score."""

    label: str
    score: float


class _Row(msgspec.Struct, gc=False):
    index: int
    embedding: list[float] | str
    object: str = "embedding"


class _PackedRow(msgspec.Struct, gc=False):
    index: int
    embedding: Any  # list of floats, base64 string, or little-endian float32 bytes
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


_embeddings = msgspec.json.Decoder(_Embeddings)
_packed_embeddings = msgspec.msgpack.Decoder(_PackedEmbeddings)


class Timed:
    """What every response has: times in seconds, and the headers of each request's reply."""

    total_time: float
    individual_request_times: list[float]

    def __init__(self, total_time: float, replies: list[Reply]) -> None:
        self.total_time = total_time
        self.individual_request_times = [reply.seconds for reply in replies]
        self._heads = replies

    @cached_property
    def response_headers(self) -> list[dict[str, str]]:
        return [reply.headers for reply in self._heads]


class OpenAIEmbeddingData(msgspec.Struct, gc=False):
    """One vector, kept as float32 bytes (or as the base64 text that was asked for) until it is looked at.

    Attributes:
        index: position in the caller's list.
        object: ``embedding``.
    """

    index: int
    _raw: Any  # str, bytes or memoryview
    object: str = "embedding"

    @property
    def embedding(self) -> list[float] | str:
        """The vector as a list of floats, rounded to float32; or the base64 text if asked for."""
        raw = self._raw
        return raw if isinstance(raw, str) else list(struct.unpack(f"<{len(raw) // 4}f", raw))

    def __repr__(self) -> str:
        return f"OpenAIEmbeddingData(index={self.index})"


class Vectors:
    """The vectors of one reply, in the order of its inputs."""

    __slots__ = ("model", "object", "offset", "rows", "usage")

    def __init__(self, rows: list[OpenAIEmbeddingData], model: str, usage: OpenAIUsage, object: str) -> None:
        self.rows = rows
        self.model = model
        self.usage = usage
        self.object = object


def joined(parts: list[Vectors]) -> Vectors:
    """All rows in one; usage summed."""
    first = parts[0]
    if len(parts) == 1:
        return first
    usage = OpenAIUsage(
        sum(part.usage.prompt_tokens for part in parts), sum(part.usage.total_tokens for part in parts)
    )
    return Vectors([row for part in parts for row in part.rows], first.model, usage, first.object)


def parse_embeddings(job: Job, reply: Reply) -> tuple[Vectors, Reply]:
    """Check one reply of ``/v1/embeddings``. Raises BadReply unless each input has exactly one vector."""
    kind = _kind(reply)
    offset = job.offset
    try:
        if kind == "raw":
            decoded = _raw_floats(job, reply)
        else:
            decoded = (_embeddings if kind == "json" else _packed_embeddings).decode(reply.body)
        rows = [
            OpenAIEmbeddingData(
                row.index + offset,
                # packed at once: float32 takes a quarter of JSON, and keeping JSON costs more than packing it
                row.embedding if type(row.embedding) is str else float32_bytes(row.embedding, row.index),
                row.object,
            )
            for row in in_order(job, decoded.data)
        ]
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise error if isinstance(error, BadReply) else _unreadable(reply, error) from None
    reply.body = b""
    return Vectors(rows, decoded.model, decoded.usage, decoded.object), reply


def _raw_floats(job: Job, reply: Reply) -> Any:
    """``application/octet-stream``: float32, little-endian, row-major; usage and model in a JSON header.

    The header is ``metadata`` (the form of vLLM's ``encoding_format: bytes``); its ``data`` list may be left
    out when all rows have one length and stand in order.
    """
    metadata = msgspec.json.decode(reply.headers.get("metadata", "{}"))
    width, over = divmod(len(reply.body), 4 * job.items)
    if over or not width:
        raise ValueError(f"{len(reply.body)} bytes are not {job.items} rows of float32")
    view = memoryview(reply.body)  # the rows are slices of it: no copy
    rows = [_PackedRow(i, view[i * width * 4 : (i + 1) * width * 4]) for i in range(job.items)]
    for row, entry in zip(rows, metadata.get("data", ())):
        if entry.get("embed_dtype", "float32") != "float32" or entry.get("endianness", "little") == "big":
            raise ValueError("raw embeddings must be little-endian float32")
        if [entry["start"], entry["end"]] != [row.index * width * 4, (row.index + 1) * width * 4]:
            raise ValueError("raw embeddings must stand in order, without gaps")
    usage = msgspec.convert(metadata.get("usage"), OpenAIUsage)
    return _PackedEmbeddings(rows, str(metadata.get("model", "")), usage)


class OpenAIEmbeddingsResponse(Timed):
    """Vectors in the order of the inputs.

    Attributes:
        object: ``list``.
        data: one OpenAIEmbeddingData an input.
        model: as the server names it.
        usage: summed over all requests.
        total_time, individual_request_times: seconds.
        response_headers: one dict a request, names in lower case.
    """

    def __init__(self, total_time: float, parts: list[Vectors], replies: list[Reply]) -> None:
        super().__init__(total_time, replies)
        self._parts = parts
        self.object = self._parts[0].object
        self.model = self._parts[0].model
        self.usage = OpenAIUsage(
            sum(part.usage.prompt_tokens for part in self._parts),
            sum(part.usage.total_tokens for part in self._parts),
        )

    @cached_property
    def data(self) -> list[OpenAIEmbeddingData]:
        return [row for part in self._parts for row in part.rows]

    def numpy(self) -> NDArray[np.float32]:
        """All vectors as float32 [inputs, dimensions]; base64 and raw floats too, not only JSON numbers.

        Raises ValueError when the vectors have different lengths, ImportError without numpy.
        """
        return to_numpy(row for part in self._parts for row in part.rows)


def to_numpy(rows: Iterator[OpenAIEmbeddingData]) -> NDArray[np.float32]:
    import numpy as np

    chunks: list[Any] = []
    expected = -1
    for i, row in enumerate(rows):
        chunk = float32_bytes(row._raw, i)
        if len(chunk) != expected:
            if expected >= 0:
                raise ValueError(
                    f"all embeddings must have the same dimension: expected {expected // 4}, "
                    f"got {len(chunk) // 4} at index {i}"
                )
            expected = len(chunk)
        chunks.append(chunk)
    if not chunks:
        raise ValueError("there are no embeddings to convert")
    out = np.empty((len(chunks), expected // 4), dtype=np.float32)
    flat = out.reshape(-1).view(np.uint8).data if out.size else memoryview(b"")
    for i, chunk in enumerate(chunks):
        flat[i * expected : (i + 1) * expected] = chunk
        chunks[i] = None
    return out if sys.byteorder == "little" else out.byteswap()


def float32_bytes(raw: Any, index: int) -> Any:
    """Little-endian float32 bytes of one vector in any of its forms. Raises ValueError."""
    if isinstance(raw, list):
        try:
            return _pack(len(raw))(*raw)
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
def _pack(count: int) -> Any:
    return struct.Struct(f"<{count}f").pack  # 5 times faster than numpy.array(list)


class RerankResponse(Timed):
    """Scores; see ``PerformanceClient.rerank`` for their order."""

    def __init__(
        self,
        data: list[RerankResult],
        total_time: float | None = None,
        individual_request_times: list[float] | None = None,
        response_headers: list[dict[str, str]] | None = None,
    ) -> None:
        self.object = "list"
        self.data = data
        _take(self, total_time, individual_request_times, response_headers)

    def sorted(self) -> list[RerankResult]:
        """Best first, over all requests; equal scores in the order of the texts."""
        return sorted(self.data, key=lambda result: (-result.score, result.index))


class ClassificationResponse(Timed):
    """``data[i]`` are the labels of the i-th input."""

    def __init__(
        self,
        data: list[list[ClassificationResult]],
        total_time: float | None = None,
        individual_request_times: list[float] | None = None,
        response_headers: list[dict[str, str]] | None = None,
    ) -> None:
        self.object = "list"
        self.data = data
        _take(self, total_time, individual_request_times, response_headers)


def _take(response: Any, total: Any, times: Any, headers: Any) -> None:
    response.total_time = total
    response.individual_request_times = times
    response.response_headers = headers if headers is not None else []


class BatchPostResponse(Timed):
    """``data[i]`` is the decoded reply to the i-th payload; ``{}`` for an empty one without a JSON body."""

    def __init__(self, total_time: float, parts: list[tuple[Any, Reply]]) -> None:
        super().__init__(total_time, [reply for _, reply in parts])
        self.data = [value for value, _ in parts]


_rerank = msgspec.json.Decoder(list[RerankResult])
_rerank_packed = msgspec.msgpack.Decoder(list[RerankResult])
_labels = msgspec.json.Decoder(list[list[ClassificationResult]])
_labels_packed = msgspec.msgpack.Decoder(list[list[ClassificationResult]])


def parse_rerank(job: Job, reply: Reply) -> tuple[list[RerankResult], Reply]:
    """Results in the server's order with shifted indices. Raises BadReply unless each text has one."""
    results = _decode(reply, _rerank, _rerank_packed)
    in_order(job, results)
    for result in results:
        result.index += job.offset
    return results, reply


def parse_classify(job: Job, reply: Reply) -> tuple[list[list[ClassificationResult]], Reply]:
    """One list of labels an input. Raises BadReply on any other count."""
    groups = _decode(reply, _labels, _labels_packed)
    if len(groups) != job.items:
        raise BadReply(f"the server answered {len(groups)} inputs of {job.items}")
    return groups, reply


def parse_any(job: Job, reply: Reply) -> tuple[Any, Reply]:
    """Any JSON or MessagePack. Raises BadReply; an empty body is ``{}`` where the method sends none."""
    if not reply.body and job.body is None:
        return {}, reply
    return _decode(reply, _anything, _anything_packed), reply


_anything = msgspec.json.Decoder()
_anything_packed = msgspec.msgpack.Decoder()


def _decode(reply: Reply, json: Any, packed: Any) -> Any:
    decoder = packed if _kind(reply) == "msgpack" else json
    try:
        value = decoder.decode(reply.body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _unreadable(reply, error) from None
    reply.body = b""
    return value


def _kind(reply: Reply) -> str:
    lower = reply.head.lower()
    if b"msgpack" in lower:
        content_type = reply.headers.get("content-type", "")
        if content_type.split(";")[0].strip() in ("application/msgpack", "application/x-msgpack"):
            return "msgpack"
    if b"octet-stream" in lower and "octet-stream" in reply.headers.get("content-type", ""):
        return "raw"
    return "json"


def _unreadable(reply: Reply, error: Exception) -> BadReply:
    start = bytes(reply.body[:80])
    return BadReply(f"cannot read the {reply.status} reply: {error}; it begins {start!r}")


def in_order(job: Job, rows: list[Any]) -> list[Any]:
    """Rows sorted by index. Raises BadReply unless the indices are exactly those of the inputs sent."""
    if len(rows) != job.items:
        raise BadReply(f"the server answered {len(rows)} inputs of {job.items}")
    if all(row.index == i for i, row in zip(itertools.count(), rows)):
        return rows
    ordered = sorted(rows, key=lambda row: row.index)
    if any(row.index != i for i, row in enumerate(ordered)):
        wrong = sorted(row.index for row in rows)[:8]
        raise BadReply(f"the reply's indices are {wrong}; expected each of 0 to {job.items - 1} once")
    return ordered
