"""The bulk client. Every method is written once, as a coroutine; both faces are derived from it."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from headrace.client import responses
from headrace.client.background import async_face, sync_face
from headrace.client.endpoints import EndpointPool
from headrace.client.exceptions import InvalidArgument
from headrace.client.http1 import Reply
from headrace.client.operation import Job, Operation, Target
from headrace.client.payloads import check_texts, encode, split
from headrace.client.preference import RequestProcessingPreference, check_headers
from headrace.client.transport import HttpClientWrapper

__all__ = ["PerformanceClient"]

R = TypeVar("R")
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
_WITHOUT_BODY = ("GET", "HEAD", "DELETE", "OPTIONS")


class PerformanceClient:
    """Sends many inputs as fast as a server takes them.

    Args:
        base_url: such as ``https://host/environments/production/sync``; paths are put behind it.
        api_key: default: the environment's HEADRACE_API_KEY, BASETEN_API_KEY or OPENAI_API_KEY.
        http_version: see HttpClientWrapper.
        client_wrapper: a connection pool to share.
        proxy: see HttpClientWrapper.
        endpoint_pool: several deployments; requests go to them instead of ``base_url``.

    All methods raise InvalidArgument (a ValueError) before anything is sent, HTTPError and Timeout as the
    requests library's, and ConnectionFailed, BadReply and Cancelled (ValueErrors). A failing request fails
    the whole operation, and whatever else was in flight is cancelled first.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        http_version: int = 1,
        client_wrapper: HttpClientWrapper | None = None,
        proxy: str | None = None,
        endpoint_pool: EndpointPool | None = None,
    ) -> None:
        names = ("HEADRACE_API_KEY", "BASETEN_API_KEY", "OPENAI_API_KEY")
        if api_key is None:
            api_key = next((os.environ[name] for name in names if os.environ.get(name)), None)
        if api_key is None:
            raise InvalidArgument(
                f"there is no API key: give api_key or set one of {', '.join(names)}", param="api_key"
            )
        wrapper = client_wrapper or HttpClientWrapper(http_version, proxy)
        self._target = Target(base_url.rstrip("/"), wrapper, api_key, endpoint_pool)
        if endpoint_pool is not None:
            endpoint_pool.watch()

    @property
    def api_key(self) -> str:
        return self._target.api_key

    @property
    def base_url(self) -> str:
        return self._target.base_url

    def get_client_wrapper(self) -> HttpClientWrapper:
        """The connection pool, for another client's ``client_wrapper``."""
        return self._target.wrapper

    def __repr__(self) -> str:
        return f"PerformanceClient({self.base_url!r})"

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
        fields = embedding_fields(model, encoding_format, dimensions, user)
        begun = time.perf_counter()
        parts = await self._batches(
            "/v1/embeddings", texts, lambda b: {"input": b, **fields}, responses.parse_embeddings, preference
        )
        return responses.OpenAIEmbeddingsResponse(time.perf_counter() - begun, parts)

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

    async def _batches(
        self,
        path: str,
        texts: list[str],
        payload: Callable[[list[str]], dict[str, Any]],
        parse: Callable[[Job, Reply], R],
        preference: RequestProcessingPreference | None,
    ) -> list[R]:
        preference = preference or RequestProcessingPreference()
        preference.check()
        groups = list(split(texts, preference.batch_size, preference.max_chars_per_request))
        return await self._all(batch_jobs(path, iter(groups), payload), len(groups), parse, preference)

    async def _all(
        self,
        jobs: Iterator[Job],
        count: int,
        parse: Callable[[Job, Reply], R],
        preference: RequestProcessingPreference | None,
        headers: dict[str, str] | None = None,
    ) -> list[R]:
        preference = preference or RequestProcessingPreference()
        operation = Operation(self._target, preference, count, headers)
        width = min(preference.max_concurrent_requests, count)
        return [part async for part in operation.stream(jobs, parse, width=width)]


def batch_jobs(
    path: str, groups: Iterator[list[str]], payload: Callable[[list[str]], dict[str, Any]]
) -> Iterator[Job]:
    """Bodies are encoded when their turn comes, so that they never lie in memory together."""
    offset = 0
    for index, group in enumerate(groups):
        body = encode(payload(group), f"the text at {offset} or one of the {len(group) - 1} after it")
        yield Job(index, path, body, offset, len(group))
        offset += len(group)


def embedding_fields(
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
