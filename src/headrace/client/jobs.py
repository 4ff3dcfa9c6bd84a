"""Batch jobs: a JSONL file of requests in, a JSONL file of answers out, resumable at any point.

The format is OpenAI's (https://platform.openai.com/docs/guides/batch): input lines
``{"custom_id", "method", "url", "body"}``; output lines ``{"id", "custom_id", "response", "error"}``. Answers are
written as they come, so their order is not the input's. Requests that fail for good go to a second file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from headrace.client.background import async_face, sync_face
from headrace.client.core import Core
from headrace.client.exceptions import BadReply, ErrorResponse
from headrace.client.http1 import Reply
from headrace.client.limiter import AdaptiveLimit
from headrace.client.operation import Job, Operation
from headrace.client.preference import RequestProcessingPreference
from headrace.errors import HeadraceError

if TYPE_CHECKING:
    from headrace.client.ledger import Ledger

__all__ = ["BatchCounts", "BatchMethods", "errors_path"]


class BatchCounts(msgspec.Struct):
    """How far a job is. ``resumed`` of the completed and failed requests were there before this run."""

    total: int = 0
    completed: int = 0
    failed: int = 0
    resumed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def done(self) -> int:
        return self.completed + self.failed


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Body(msgspec.Struct):
    usage: _Usage | None = None


_body = msgspec.json.Decoder(_Body)
_any = msgspec.json.Decoder()
_encoder = msgspec.json.Encoder()


def errors_path(output: str | os.PathLike[str]) -> Path:
    """Where failures go: ``answers.jsonl`` has ``answers.errors.jsonl`` beside it."""
    path = Path(output)
    return path.with_name(f"{path.stem}.errors{path.suffix or '.jsonl'}")


class BatchMethods(Core):
    """``run_batch`` and its twin."""

    async def _run_batch(
        self,
        input_path: str | os.PathLike[str],
        output_path: str | os.PathLike[str],
        preference: RequestProcessingPreference | None = None,
        *,
        error_path: str | os.PathLike[str] | None = None,
        adaptive: bool = True,
        urls: frozenset[str] | None = None,
        headers: dict[str, str] | None = None,
        on_progress: Callable[[BatchCounts], object] | None = None,
    ) -> BatchCounts:
        """Answer every line of a batch file exactly once, however often this is killed and begun again.

        Requests in the output or error file already are skipped. (The server may see a request twice that was in
        flight at a kill; its answer is written once.)

        Args:
            error_path: for requests that failed for good; default ``errors_path(output_path)``. To try them
                again, delete the file.
            adaptive: let the number of requests in flight follow 429 and latency.
            urls: the only paths allowed in lines; None: any.
            headers: sent with every request.
            on_progress: called after each answer, on the client's thread.

        Raises: InvalidArgument for a bad input file, before anything is sent.
        """
        from headrace.client.ledger import Ledger, scan

        total = scan(input_path, urls)
        with Ledger(output_path) as output, Ledger(error_path or errors_path(output_path)) as errors:
            run = _Run(output, errors, BatchCounts(total), on_progress)
            run.load()
            preference = preference or RequestProcessingPreference()
            preference.check()
            width = preference.max_concurrent_requests
            limit = AdaptiveLimit(high=width) if adaptive else None
            headers = {"accept": "application/json", **(headers or {})}
            operation = Operation(self._target, preference, total - run.counts.resumed, headers, limit)
            jobs = run.jobs(input_path)
            await operation.each(jobs, run.answer, width=width, in_thread=True, on_error=run.failure)
            return run.counts

    run_batch = sync_face(_run_batch)
    async_run_batch = async_face(_run_batch)


class _Run:
    def __init__(
        self,
        output: Ledger,
        errors: Ledger,
        counts: BatchCounts,
        on_progress: Callable[[BatchCounts], object] | None,
    ) -> None:
        self.output, self.errors = output, errors
        self.counts, self.on_progress = counts, on_progress
        self._ids: dict[int, str] = {}  # of the requests in flight

    def load(self) -> None:
        from headrace.client.ledger import IdSet

        self._answered = IdSet()
        self.counts.completed = self.output.answered(self._answered)
        self.counts.failed = self.errors.answered(self._answered)
        self.counts.resumed = self.counts.done
        self._answered.freeze()
        self._tell()

    def jobs(self, path: str | os.PathLike[str]) -> Iterator[Job]:
        from headrace.client.ledger import read_lines

        index = 0
        for _, line in read_lines(path):
            if line.custom_id not in self._answered:
                self._ids[index] = line.custom_id
                yield Job(index, line.url, bytes(line.body))
                index += 1

    def answer(self, job: Job, reply: Reply) -> None:
        usage = _check(reply)
        response = {"status_code": reply.status, "request_id": reply.headers.get("x-request-id", "")}
        self._write(self.output, job, {**response, "body": msgspec.Raw(_one_line(reply.body))}, None)
        self.counts.completed += 1
        if usage is not None:
            self.counts.prompt_tokens += usage.prompt_tokens
            self.counts.completion_tokens += usage.completion_tokens
        self._tell()

    def failure(self, job: Job, error: Exception) -> None:
        if isinstance(error, OSError) and not isinstance(error, HeadraceError):
            raise error  # our own disk, not the request
        if job.index not in self._ids:
            raise error
        code = error.code if isinstance(error, HeadraceError) else type(error).__name__
        response = getattr(error, "response", None)
        told = None
        if isinstance(response, ErrorResponse):
            told = {
                "status_code": response.status_code,
                "request_id": response.headers.get("x-request-id", ""),
                "body": _json_or_text(response),
            }
        self._write(self.errors, job, told, {"code": code, "message": str(error)})
        self.counts.failed += 1
        self._tell()

    def _write(self, ledger: Ledger, job: Job, response: Any, error: Any) -> None:
        custom_id = self._ids[job.index]
        line = {
            "id": f"batch_req_{os.urandom(8).hex()}",
            "custom_id": custom_id,
            "response": response,
            "error": error,
        }
        ledger.write(_encoder.encode(line) + b"\n")
        del self._ids[job.index]

    def _tell(self) -> None:
        if self.on_progress is not None:
            self.on_progress(self.counts)


def _check(reply: Reply) -> _Usage | None:
    """The reply's usage. Raises BadReply when it is not JSON as a whole."""
    try:
        _any.decode(reply.body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadReply(f"the reply is not JSON: {error}; it begins {reply.body[:80]!r}") from None
    try:
        return _body.decode(reply.body).usage
    except msgspec.MsgspecError:
        return None  # a JSON reply of another kind


def _one_line(body: bytes) -> bytes:
    """JSON without line breaks, which can only stand between its tokens."""
    return body.replace(b"\n", b" ").replace(b"\r", b" ")


def _json_or_text(response: ErrorResponse) -> Any:
    try:
        return response.json()
    except ValueError:
        return response.text
