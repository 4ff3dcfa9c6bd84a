"""What all methods of the client stand on: the target, and ways through an Operation."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar

from headrace.client.endpoints import EndpointPool
from headrace.client.exceptions import InvalidArgument
from headrace.client.http1 import Reply
from headrace.client.logs import show_as_asked
from headrace.client.operation import Job, Operation, Target
from headrace.client.payloads import encode, split
from headrace.client.preference import RequestProcessingPreference
from headrace.client.transport import HttpClientWrapper
from headrace.client.vectors import Vectors

if TYPE_CHECKING:
    from headrace.client.processes import Helpers

__all__ = ["Core", "api_key_from_environment"]

R = TypeVar("R")
_KEYS = ("HEADRACE_API_KEY", "BASETEN_API_KEY", "OPENAI_API_KEY")


def api_key_from_environment() -> str | None:
    """The first of HEADRACE_API_KEY, BASETEN_API_KEY and OPENAI_API_KEY that is set and not empty."""
    return next((os.environ[name] for name in _KEYS if os.environ.get(name)), None)


class Core:
    """Where requests go, and with which key."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        http_version: int = 1,
        client_wrapper: HttpClientWrapper | None = None,
        proxy: str | None = None,
        endpoint_pool: EndpointPool | None = None,
        *,
        processes: int = 1,
    ) -> None:
        show_as_asked()
        api_key = api_key if api_key is not None else api_key_from_environment()
        if api_key is None:
            raise InvalidArgument(
                f"there is no API key: give api_key or set one of {', '.join(_KEYS)}", param="api_key"
            )
        wrapper = client_wrapper or HttpClientWrapper(http_version, proxy)
        alone = endpoint_pool is not None or (client_wrapper is not None and client_wrapper.custom_tls)
        if processes < 1 or (processes > 1 and alone):
            raise InvalidArgument(
                f"processes is {processes}; expected at least 1, and 1 with an endpoint_pool or ssl_context",
                param="processes",
            )
        self._helpers: Helpers | None = None
        if processes > 1:
            from headrace.client.processes import Helpers  # only here: few clients have any

            self._helpers = Helpers(processes - 1)
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
        return f"{type(self).__name__}({self.base_url!r})"

    async def embed_block(
        self,
        groups: list[list[str]],
        fields: dict[str, Any],
        preference: RequestProcessingPreference,
        into: Vectors,
        offset: int = 0,
    ) -> list[Reply]:
        """Vectors of groups of texts, a request for each group; the first text is ``into``'s row ``offset``."""
        jobs = _batch_jobs("/v1/embeddings", groups, lambda group: {"input": group, **fields}, offset)
        return await self._all(jobs, len(groups), into.take, preference)

    async def _batches(
        self,
        path: str,
        texts: list[str],
        payload: Callable[[list[str]], dict[str, Any]],
        parse: Callable[[Job, Reply], R],
        preference: RequestProcessingPreference | None,
    ) -> list[R]:
        """All parsed replies to ``texts``, split as the preference says."""
        preference = preference or RequestProcessingPreference()
        preference.check()
        groups = list(split(texts, preference.batch_size, preference.max_chars_per_request))
        return await self._all(_batch_jobs(path, groups, payload), len(groups), parse, preference)

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
        results: list[Any] = [None] * count

        def keep(job: Job, reply: Reply) -> None:
            results[job.index] = parse(job, reply)

        await operation.each(jobs, keep, width=width)
        return results

    async def _flow(
        self,
        path: str,
        texts: Iterable[str],
        payload: Callable[[list[str]], dict[str, Any]],
        parse: Callable[[Job, Reply], R],
        preference: RequestProcessingPreference | None,
    ) -> AsyncGenerator[R, None]:
        """Parsed replies as they come, in order: memory for some ``2 x max_concurrent_requests`` of them."""
        preference = preference or RequestProcessingPreference()
        operation = Operation(self._target, preference)
        groups = split(_checked(texts), preference.batch_size, preference.max_chars_per_request)
        width = preference.max_concurrent_requests
        jobs = _batch_jobs(path, groups, payload)
        stream = operation.stream(jobs, parse, width=width, ahead=2 * width, in_thread=True)
        async with aclosing(stream) as parts:
            async for part in parts:
                yield part


def _checked(texts: Iterable[str]) -> Iterator[str]:
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"input {i} is {type(text).__name__}, expected str")
        yield text


def _batch_jobs(
    path: str,
    groups: Iterable[list[str]],
    payload: Callable[[list[str]], dict[str, Any]],
    offset: int = 0,
) -> Iterator[Job]:
    """Bodies are encoded when their turn comes, so that they never lie in memory together."""
    for index, group in enumerate(groups):
        body = encode(payload(group), f"the text at {offset} or one of the {len(group) - 1} after it")
        yield Job(index, path, body, offset, len(group))
        offset += len(group)
