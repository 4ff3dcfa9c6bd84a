"""Batch jobs on the server: the client's own job code, pointed at this server.

Lines go through the same HTTP routes as everybody's requests, so admission, limits and errors are the same. Jobs
survive the server: an unfinished one goes on when a server with the same folder starts.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from headrace.client import (
    BatchCounts,
    CancellationToken,
    Cancelled,
    InvalidArgument,
    PerformanceClient,
    RequestProcessingPreference,
    exceptions,
)
from headrace.client.ledger import BadLine
from headrace.errors import HeadraceError, InvalidRequest, NotFound, Overloaded
from headrace.serving.files import FileStore, save

__all__ = ["ENDPOINTS", "WINDOW", "Batch", "BatchJobs", "new_batch"]

log = logging.getLogger(__name__)
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
WINDOW = "24h"
_WINDOW_S = 24 * 3600
_AT_ONCE = 2  # jobs
_WIDTH = 64  # requests in flight of one job, at most; fewer when the server is busy
_MAX_LIVE = 100
_LIVE = ("validating", "in_progress", "finalizing", "cancelling")


class Batch(msgspec.Struct, kw_only=True):
    """OpenAI's batch object, and the digest of the key that owns it. Times are Unix seconds."""

    id: str
    endpoint: str
    input_file_id: str
    created_at: int
    expires_at: int
    completion_window: str = WINDOW
    status: str = "validating"
    metadata: dict[str, str] | None = None
    errors: dict[str, Any] | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: dict[str, int] = msgspec.field(
        default_factory=lambda: {"total": 0, "completed": 0, "failed": 0}
    )
    owner: str = ""

    def shown(self) -> dict[str, Any]:
        """What clients see."""
        fields: dict[str, Any] = msgspec.to_builtins(self)
        del fields["owner"]
        return fields | {"object": "batch"}


_decoder = msgspec.json.Decoder(Batch)


class BatchJobs:
    """All batch jobs of one server.

    Args:
        folder: for files, and for what jobs have done so far.
        api_key: opens this server.
        ready: whether all models take requests; jobs wait for that.
    """

    def __init__(self, folder: Path, api_key: str | None, ready: Callable[[], bool]) -> None:
        self.files = FileStore(folder / "files")
        self.folder = folder / "batches"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._key = api_key or "none"
        self._ready = ready
        self._url = ""
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._tokens: dict[str, CancellationToken] = {}
        self._stopping = False
        self._batches = {
            found.id: found
            for found in (_decoder.decode(p.read_bytes()) for p in self.folder.glob("batch_*.json"))
        }

    def start(self, url: str) -> None:
        """The server listens at ``url``: go on with what an earlier one left."""
        self._url = url
        self._slots = asyncio.Semaphore(_AT_ONCE)
        for batch in self._batches.values():
            if batch.status in _LIVE:
                self._begin(batch)

    async def stop(self) -> None:
        """Interrupt all jobs; what they have done stays on disk."""
        self._stopping = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def create(self, batch: Batch) -> None:
        """Register a new batch and begin. Raises NotFound for its file, Overloaded for too many."""
        self.files.get(batch.input_file_id, batch.owner)
        live = sum(one.status in _LIVE for one in self._batches.values())
        if live >= _MAX_LIVE:
            raise Overloaded(f"{live} batches are waiting or running already", retry_after=60.0)
        self._batches[batch.id] = batch
        self._save(batch)
        self._begin(batch)

    def get(self, batch_id: str, owner: str) -> Batch:
        """Raises NotFound, also for another key's batch."""
        batch = self._batches.get(batch_id)
        if batch is None or batch.owner != owner:
            raise NotFound(f"no batch {batch_id[:64]!r}", param="batch_id", code="batch_not_found")
        return batch

    def all(self, owner: str) -> list[Batch]:
        """Newest first."""
        mine = [one for one in self._batches.values() if one.owner == owner]
        return sorted(mine, key=lambda one: (one.created_at, one.id), reverse=True)

    def cancel(self, batch_id: str, owner: str) -> Batch:
        """Stop a job; what was answered so far becomes its output. Raises InvalidRequest when it has ended."""
        batch = self.get(batch_id, owner)
        if batch.status not in _LIVE:
            raise InvalidRequest(f"batch {batch_id} has ended: {batch.status}", param="batch_id")
        self._turn(batch, "cancelling")
        self._tokens[batch.id].cancel()
        return batch

    def _begin(self, batch: Batch) -> None:
        self._tokens[batch.id] = CancellationToken()
        if batch.status == "cancelling":
            self._tokens[batch.id].cancel()
        task = asyncio.create_task(self._run(batch))
        self._tasks[batch.id] = task
        task.add_done_callback(lambda _: (self._tasks.pop(batch.id, None), self._tokens.pop(batch.id, None)))

    async def _run(self, batch: Batch) -> None:
        status = "completed"
        try:
            async with self._slots:
                while not self._ready():
                    await asyncio.sleep(0.1)
                await self._work(batch)
        except asyncio.CancelledError:
            if self._stopping:
                return
            raise
        except Cancelled:
            status = "cancelled"
        except exceptions.Timeout:  # its base is imported when first asked for
            status = "expired"
        except (InvalidArgument, NotFound) as error:
            status = "failed"
            batch.errors = _told(error, str(self.files.path(batch.input_file_id)), batch.input_file_id)
        except (HeadraceError, OSError) as error:
            log.exception("batch %s failed", batch.id)
            status = "failed"
            batch.errors = _told(HeadraceError(type(error).__name__, code="internal_error"))
        self._finish(batch, status)

    async def _work(self, batch: Batch) -> None:
        self.files.get(batch.input_file_id, batch.owner)
        left = batch.expires_at - time.time()
        preference = RequestProcessingPreference(
            max_concurrent_requests=_WIDTH,
            cancel_token=self._tokens[batch.id],
            timeout_s=max(0.1, min(3600.0, left)),
            total_timeout_s=max(0.1, left),
        )
        client = PerformanceClient(self._url, self._key)
        output, errors = self._outputs(batch)

        def on_progress(counts: BatchCounts) -> None:
            batch.request_counts = {
                "total": counts.total,
                "completed": counts.completed,
                "failed": counts.failed,
            }

        if batch.status == "validating":
            self._turn(batch, "in_progress")
        await client.async_run_batch(
            self.files.path(batch.input_file_id),
            output,
            preference,
            error_path=errors,
            urls=frozenset({batch.endpoint}),
            on_progress=on_progress,
        )

    def _outputs(self, batch: Batch) -> tuple[Path, Path]:
        return self.folder / f"{batch.id}.output.jsonl", self.folder / f"{batch.id}.errors.jsonl"

    def _finish(self, batch: Batch, status: str) -> None:
        """Results become files, then the batch's state changes: a crash between repeats the first only."""
        output, errors = self._outputs(batch)
        for path, name in ((output, "output_file_id"), (errors, "error_file_id")):
            if path.exists() and path.stat().st_size:
                stored = self.files.add(path, path.name, "batch_output", batch.owner)
                setattr(batch, name, stored.id)
            else:
                path.unlink(missing_ok=True)
        self._turn(batch, status)

    def _turn(self, batch: Batch, status: str) -> None:
        batch.status = status
        setattr(batch, f"{status}_at", int(time.time()))
        self._save(batch)

    def _save(self, batch: Batch) -> None:
        save(self.folder / f"{batch.id}.json", msgspec.json.encode(batch))


def _told(error: HeadraceError, path: str = "/", name: str = "/") -> dict[str, Any]:
    """OpenAI's list of a batch's errors; the input file goes by its id, not by where it lies."""
    line, message = None, error.message.replace(path, name)
    if isinstance(error, BadLine):
        line, message = error.line, error.text
    row = {"code": error.code, "message": message, "param": error.param, "line": line}
    return {"object": "list", "data": [row]}


def new_batch(input_file_id: str, endpoint: str, metadata: dict[str, str] | None, owner: str) -> Batch:
    """A batch that begins now."""
    now = int(time.time())
    return Batch(
        id=f"batch_{secrets.token_hex(12)}",
        endpoint=endpoint,
        input_file_id=input_file_id,
        created_at=now,
        expires_at=now + _WINDOW_S,
        metadata=metadata,
        owner=owner,
    )
