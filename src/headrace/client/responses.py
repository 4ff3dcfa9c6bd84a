"""Replies, checked and joined: what the methods of the client return."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec

from headrace.client.exceptions import BadReply
from headrace.client.http1 import Reply
from headrace.client.operation import Job
from headrace.client.replies import OpenAIUsage, in_order, kind_of, unreadable
from headrace.client.vectors import OpenAIEmbeddingData, Vectors

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


class RerankResult(msgspec.Struct, gc=False):
    """The score of the text at ``index`` of the caller's list."""

    index: int
    score: float
    text: str | None = None


class ClassificationResult(msgspec.Struct, gc=False):
    """One label and its score."""

    label: str
    score: float


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

    def __init__(self, total_time: float, vectors: Vectors, replies: list[Reply]) -> None:
        super().__init__(total_time, replies)
        self._vectors = vectors
        self.object = vectors.object
        self.model = vectors.model
        self.usage = vectors.usage

    @cached_property
    def data(self) -> list[OpenAIEmbeddingData]:
        return self._vectors.rows()

    def numpy(self) -> NDArray[np.float32]:
        """All vectors as float32 [inputs, dimensions]; base64 and raw floats too, not only JSON numbers.

        The array is the response's own memory, not a copy of it. Raises ValueError when the vectors have different
        lengths, ImportError without numpy.
        """
        return self._vectors.numpy()


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
    decoder = packed if kind_of(reply) == "msgpack" else json
    try:
        value = decoder.decode(reply.body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise unreadable(reply, error) from None
    reply.body = b""
    return value
