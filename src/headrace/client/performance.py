"""The bulk client. Every method is written once, as a coroutine; both faces are derived from it."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from headrace.client import responses
from headrace.client.background import async_face, sync_face
from headrace.client.exceptions import InvalidArgument
from headrace.client.generation import GenerationMethods
from headrace.client.http1 import Reply
from headrace.client.jobs import BatchMethods
from headrace.client.operation import Job
from headrace.client.payloads import check_texts, encode, split
from headrace.client.preference import RequestProcessingPreference, check_headers
from headrace.client.pump import async_iterator, sync_iterator
from headrace.client.vectors import Vectors

__all__ = ["PerformanceClient"]

_MIN_SHARED = 1024  # requests; below, starting a process costs more than it brings
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
_WITHOUT_BODY = ("GET", "HEAD", "DELETE", "OPTIONS")


class PerformanceClient(GenerationMethods, BatchMethods):
    """Sends many inputs as fast as a server takes them.

    Args:
        base_url: such as ``https://host/environments/production/sync``; paths are put behind it.
        api_key: default: the environment's HEADRACE_API_KEY, BASETEN_API_KEY or OPENAI_API_KEY.
        http_version: see HttpClientWrapper.
        client_wrapper: a connection pool to share.
        proxy: see HttpClientWrapper.
        endpoint_pool: several deployments; requests go to them instead of ``base_url``.
        processes: how many share an ``embed`` of 1,024 requests or more; above 1 pays where parsing JSON numbers
            keeps one core busy. Not with ``endpoint_pool``.

    All methods raise InvalidArgument (a ValueError) before anything is sent, HTTPError and Timeout as the
    requests library's, and ConnectionFailed, BadReply and Cancelled (ValueErrors). A failing request fails
    the whole operation, and whatever else was in flight is cancelled first.
    """

    async def _embed(
        self,
        input: Sequence[str],
        model: str,
        encoding_format: str | None = None,
        dimensions: int | None = None,
        user: str | None = None,
        preference: RequestProcessingPreference | None = None,
    ) -> responses.OpenAIEmbeddingsResponse:
        """Vectors of texts, from ``/v1/embeddings``.

        Args:
            encoding_format: ``float``, ``base64`` (fewer bytes, faster ``numpy()``), or another.
            dimensions: leading dimensions to keep, for Matryoshka models.
        """
        texts = check_texts("input", input, empty="Input list cannot be empty")
        fields = _embedding_fields(model, encoding_format, dimensions, user)
        begun = time.perf_counter()
        preference = preference or RequestProcessingPreference()
        preference.check()
        groups = list(split(texts, preference.batch_size, preference.max_chars_per_request))
        vectors = Vectors(len(texts))
        if self._helpers is not None and len(groups) >= _MIN_SHARED:
            from headrace.client.processes import embed_blocks

            replies = await embed_blocks(self, self._helpers, groups, fields, preference, vectors)
        else:
            replies = await self.embed_block(groups, fields, preference, vectors)
        return responses.OpenAIEmbeddingsResponse(time.perf_counter() - begun, vectors, replies)

    async def _rerank(
        self,
        query: str,
        texts: Sequence[str],
        raw_scores: bool = False,
        model: str | None = None,
        return_text: bool = False,
        truncate: bool = False,
        truncation_direction: str = "Right",
        preference: RequestProcessingPreference | None = None,
        *,
        sort: bool = False,
    ) -> responses.RerankResponse:
        """Scores of texts for a query, from ``/rerank``.

        Results come as the server sends them, request after request, with indices into ``texts``; servers
        sort within one request. ``sort=True`` sorts over all of them, best first.
        """
        items = check_texts("texts", texts, empty="Texts list cannot be empty")
        fields = _scoring(model, raw_scores, truncate, truncation_direction)
        fields |= {"query": query, "return_text": return_text}
        begun = time.perf_counter()
        parts = await self._batches(
            "/rerank", items, lambda b: {**fields, "texts": b}, responses.parse_rerank, preference
        )
        response = responses.RerankResponse(
            list(itertools.chain.from_iterable(part for part, _ in parts)),
            time.perf_counter() - begun,
            [reply.seconds for _, reply in parts],
            [reply.headers for _, reply in parts],
        )
        if sort:
            response.data = response.sorted()
        return response

    async def _classify(
        self,
        inputs: Sequence[str],
        model: str | None = None,
        raw_scores: bool = False,
        truncate: bool = False,
        truncation_direction: str = "Right",
        preference: RequestProcessingPreference | None = None,
    ) -> responses.ClassificationResponse:
        """Labels and scores of texts, from ``/predict``."""
        items = check_texts("inputs", inputs, empty="Inputs list cannot be empty")
        fields = _scoring(model, raw_scores, truncate, truncation_direction)
        begun = time.perf_counter()
        parts = await self._batches(
            "/predict",
            items,
            lambda batch: {"inputs": [[text] for text in batch], **fields},
            responses.parse_classify,
            preference,
        )
        return responses.ClassificationResponse(
            list(itertools.chain.from_iterable(part for part, _ in parts)),
            time.perf_counter() - begun,
            [reply.seconds for _, reply in parts],
            [reply.headers for _, reply in parts],
        )

    async def _batch_post(
        self,
        url_path: str,
        payloads: Sequence[Any],
        custom_headers: Mapping[str, str] | RequestProcessingPreference | None = None,
        preference: RequestProcessingPreference | None = None,
        method: str | None = None,
    ) -> responses.BatchPostResponse:
        """One request a payload to any path.

        Args:
            payloads: anything JSON can hold; not sent with GET, HEAD, DELETE and OPTIONS.
            custom_headers: for this call. A preference is accepted in its place, as the hosted client's
                compiled signature has no such argument.
            method: GET, POST (default), PUT, PATCH, DELETE, HEAD or OPTIONS.
        """
        if isinstance(custom_headers, RequestProcessingPreference):
            if preference is not None:
                raise TypeError("batch_post() got two preferences")
            custom_headers, preference = None, custom_headers
        method = "POST" if method is None else method
        if method not in _METHODS:
            raise InvalidArgument(
                f"method is {method!r}; expected one of {', '.join(_METHODS)}", param="method"
            )
        headers = dict(custom_headers or {})
        check_headers("custom_headers", headers)
        if not isinstance(payloads, Sequence) or isinstance(payloads, (str, bytes)):
            raise TypeError(f"argument 'payloads': expected a list, not {type(payloads).__name__}")
        if not payloads:
            raise InvalidArgument("Payloads list cannot be empty", param="payloads")
        path = "/" + url_path.lstrip("/")
        bodies: list[bytes | None] = [None] * len(payloads)
        if method not in _WITHOUT_BODY:
            bodies = [encode(payload, f"payload {i}") for i, payload in enumerate(payloads)]
        jobs = (Job(i, path, body, i, 1, method) for i, body in enumerate(bodies))
        begun = time.perf_counter()
        parts = await self._all(jobs, len(bodies), responses.parse_any, preference, headers)
        return responses.BatchPostResponse(time.perf_counter() - begun, parts)

    async def _batch_system_one(
        self, requests: Sequence[Mapping[str, Any]], preference: RequestProcessingPreference | None = None
    ) -> responses.BatchPostResponse:
        """One POST to ``/v1/systemone`` for each ``{"state": ..., "questions": ...}``."""
        return await self._batch_post("/v1/systemone", requests, None, preference)

    async def _embed_stream(
        self,
        input: Iterable[str],
        model: str,
        encoding_format: str | None = None,
        dimensions: int | None = None,
        user: str | None = None,
        preference: RequestProcessingPreference | None = None,
    ) -> AsyncGenerator[responses.OpenAIEmbeddingsResponse, None]:
        """Vectors of any number of texts in constant memory: one response a request, in order.

        Indices count over all inputs. The texts are taken from the iterable in a thread, as they are needed.
        """
        fields = _embedding_fields(model, encoding_format, dimensions, user)

        def parse(job: Job, reply: Reply) -> responses.OpenAIEmbeddingsResponse:
            vectors = Vectors(job.items, job.offset)
            vectors.take(job, reply)
            return responses.OpenAIEmbeddingsResponse(reply.seconds, vectors, [reply])

        parts = self._flow("/v1/embeddings", input, lambda b: {"input": b, **fields}, parse, preference)
        async with aclosing(parts):
            async for part in parts:
                yield part

    async def _classify_stream(
        self,
        inputs: Iterable[str],
        model: str | None = None,
        raw_scores: bool = False,
        truncate: bool = False,
        truncation_direction: str = "Right",
        preference: RequestProcessingPreference | None = None,
    ) -> AsyncGenerator[list[responses.ClassificationResult], None]:
        """The labels of each text, for any number of texts in constant memory, in order."""
        fields = _scoring(model, raw_scores, truncate, truncation_direction)
        parts = self._flow(
            "/predict",
            inputs,
            lambda batch: {"inputs": [[text] for text in batch], **fields},
            responses.parse_classify,
            preference,
        )
        async with aclosing(parts):
            async for groups, _ in parts:
                for group in groups:
                    yield group

    embed = sync_face(_embed)
    async_embed = async_face(_embed)
    rerank = sync_face(_rerank)
    async_rerank = async_face(_rerank)
    classify = sync_face(_classify)
    async_classify = async_face(_classify)
    batch_post = sync_face(_batch_post)
    async_batch_post = async_face(_batch_post)
    batch_system_one = sync_face(_batch_system_one)
    async_batch_system_one = async_face(_batch_system_one)
    embed_stream = sync_iterator(_embed_stream)
    async_embed_stream = async_iterator(_embed_stream)
    classify_stream = sync_iterator(_classify_stream)
    async_classify_stream = async_iterator(_classify_stream)


def _embedding_fields(
    model: str, encoding_format: str | None, dimensions: int | None, user: str | None
) -> dict[str, Any]:
    if not isinstance(model, str):
        raise TypeError(f"argument 'model': expected str, not {type(model).__name__}")
    if not model:
        raise InvalidArgument("Model name cannot be empty", param="model")
    fields: dict[str, Any] = {"model": model}
    optional = {"encoding_format": encoding_format, "dimensions": dimensions, "user": user}
    return fields | {name: value for name, value in optional.items() if value is not None}


def _scoring(model: str | None, raw_scores: bool, truncate: bool, direction: str) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "raw_scores": raw_scores,
        "truncate": truncate,
        "truncation_direction": direction,
    }
    return fields if model is None else fields | {"model": model}
