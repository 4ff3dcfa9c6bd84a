"""/v1/files and /v1/batches (https://platform.openai.com/docs/api-reference/batch)"""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

from aiohttp import BodyPartReader, web
from aiohttp.http_exceptions import HttpProcessingError
from pydantic import Field

from headrace.errors import InvalidRequest, NotFound, PayloadTooLarge
from headrace.serving.batches import ENDPOINTS, WINDOW, BatchJobs, new_batch
from headrace.serving.body import read
from headrace.serving.files import StoredFile
from headrace.serving.openai.fields import ApiModel, acts
from headrace.serving.openai.replies import encode
from headrace.serving.state import STATE

__all__ = [
    "BatchRequest",
    "cancel_batch",
    "create_batch",
    "create_file",
    "delete_file",
    "file_content",
    "get_batch",
    "get_file",
    "list_batches",
    "list_files",
]

_CHUNK = 1 << 18


class BatchRequest(ApiModel):
    """POST /v1/batches"""

    input_file_id: str = Field(description="A file of purpose `batch`.", max_length=64)
    endpoint: str = Field(description=f"The url of every line: {', '.join(ENDPOINTS)}.", max_length=64)
    completion_window: str = Field(description=f"`{WINDOW}`: what is not done then, expires.", max_length=8)
    metadata: dict[str, str] | None = acts(None, "Up to 16 pairs, given back with the batch.")


def _jobs(request: web.Request) -> BatchJobs:
    jobs = request.app[STATE].batches
    if jobs is None:
        raise NotFound(
            "files and batches need a folder: start the server with --data-dir", code="no_data_dir"
        )
    return jobs


def _owner(request: web.Request) -> str:
    """Who may see what this request makes: the digest of its key; one for all on an open server."""
    if not request.app[STATE].options.api_keys:
        return ""
    key = request.headers.get("Authorization", "").partition(" ")[2].strip()
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _json(value: Any) -> web.Response:
    return web.Response(body=encode(value), content_type="application/json")


async def create_file(request: web.Request) -> web.Response:
    """Multipart: ``purpose`` and ``file``. The content goes to disk as it comes."""
    store = _jobs(request).files
    room = store.room()
    if not request.content_type.startswith("multipart/"):
        raise InvalidRequest(
            "the body must be multipart/form-data with purpose and file", code="invalid_body"
        )
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise InvalidRequest(
            "the form is compressed; send it plain", param="Content-Encoding", code="unsupported_encoding"
        )
    part_path, purpose, filename = store.new_path(), None, None
    try:
        async for part in await request.multipart():
            if not isinstance(part, BodyPartReader):
                raise InvalidRequest("the form holds a nested form", code="invalid_body")
            if part.name == "purpose":
                purpose = (await _take(part, 64)).decode("utf-8", "replace")
            elif part.name == "file":
                filename = part.filename or "file.jsonl"
                with part_path.open("wb") as file:
                    size = 0
                    while chunk := await part.read_chunk(_CHUNK):
                        size += len(chunk)
                        if size > room:
                            raise PayloadTooLarge(f"the file is over the limit of {room} bytes", param="file")
                        await asyncio.to_thread(file.write, chunk)
            else:
                raise InvalidRequest(f"unknown field {str(part.name)[:40]!r}", param=str(part.name)[:40])
        if purpose != "batch":
            raise InvalidRequest(f"purpose is {purpose!r}; expected 'batch'", param="purpose")
        if filename is None:
            raise InvalidRequest("file is required", param="file", code="missing_field")
        return _json(store.add(part_path, filename, purpose, _owner(request)).shown())
    except (ValueError, HttpProcessingError) as error:  # aiohttp's words for a cut or malformed form
        raise InvalidRequest(f"the form cannot be read: {error}", code="invalid_body") from error
    finally:
        part_path.unlink(missing_ok=True)


async def _take(part: BodyPartReader, limit: int) -> bytes:
    data = b""
    while chunk := await part.read_chunk(1024):
        data += chunk
        if len(data) > limit:
            raise PayloadTooLarge(f"{part.name} is over {limit} bytes", param=part.name)
    return data


async def list_files(request: web.Request) -> web.Response:
    """Newest first; ``after``, ``limit`` and ``purpose`` as OpenAI has them."""
    purpose = request.query.get("purpose")
    found = [one for one in _jobs(request).files.all(_owner(request)) if purpose in (None, one.purpose)]
    return _json(_page(request, [one.shown() for one in found]))


def _file(request: web.Request) -> StoredFile:
    return _jobs(request).files.get(request.match_info["name"], _owner(request))


async def get_file(request: web.Request) -> web.Response:
    """What one file is."""
    return _json(_file(request).shown())


async def delete_file(request: web.Request) -> web.Response:
    """Remove it from the disk."""
    stored = _file(request)
    _jobs(request).files.delete(stored.id, stored.owner)
    return _json({"id": stored.id, "object": "file", "deleted": True})


async def file_content(request: web.Request) -> web.StreamResponse:
    """The content as it is."""
    path = _jobs(request).files.path(_file(request).id)
    return web.FileResponse(path, headers={"content-type": "application/octet-stream"})


async def create_batch(request: web.Request) -> web.Response:
    """Begin a job."""
    body = await read(request, BatchRequest)
    if body.endpoint not in ENDPOINTS:
        raise InvalidRequest(
            f"endpoint is {body.endpoint!r}; expected one of {', '.join(ENDPOINTS)}", param="endpoint"
        )
    if body.completion_window != WINDOW:
        raise InvalidRequest(
            f"completion_window is {body.completion_window!r}; expected {WINDOW!r}", param="completion_window"
        )
    pairs = body.metadata or {}
    if len(pairs) > 16 or any(len(key) > 64 or len(value) > 512 for key, value in pairs.items()):
        raise InvalidRequest(
            "metadata is over 16 pairs, or has a key over 64 or a value over 512 characters", param="metadata"
        )
    batch = new_batch(body.input_file_id, body.endpoint, body.metadata, _owner(request))
    _jobs(request).create(batch)
    return _json(batch.shown())


async def list_batches(request: web.Request) -> web.Response:
    """Newest first; ``after`` and ``limit`` as OpenAI has them."""
    return _json(_page(request, [one.shown() for one in _jobs(request).all(_owner(request))]))


async def get_batch(request: web.Request) -> web.Response:
    """How far one is."""
    return _json(_jobs(request).get(request.match_info["name"], _owner(request)).shown())


async def cancel_batch(request: web.Request) -> web.Response:
    """Stop one; what is answered by then is kept."""
    return _json(_jobs(request).cancel(request.match_info["name"], _owner(request)).shown())


def _page(request: web.Request, rows: list[dict[str, Any]]) -> dict[str, Any]:
    text = request.query.get("limit", "20")
    if not text.isdecimal() or not 1 <= int(text[:6]) <= 10_000:
        raise InvalidRequest(f"limit is {text[:20]!r}; expected 1 to 10000", param="limit")
    after = request.query.get("after")
    if after is not None:
        at = next((i for i, row in enumerate(rows) if row["id"] == after), None)
        if at is None:
            raise NotFound(f"after is {after[:64]!r}, which is not there", param="after")
        rows = rows[at + 1 :]
    page = rows[: int(text)]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(rows) > len(page),
    }
