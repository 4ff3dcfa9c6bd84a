"""Numbers in a reply: JSON, MessagePack or raw floats, as the request's Accept says."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from aiohttp import web

from headrace.errors import InvalidRequest
from headrace.types import EncodeOutput

__all__ = ["RAW", "Array", "array", "reply", "vectors"]

Array = npt.NDArray[np.float32]
_json = msgspec.json.Encoder()
_msgpack = msgspec.msgpack.Encoder()
JSON, MSGPACK, RAW = "application/json", "application/msgpack", "application/octet-stream"
_FORMS = {
    "": JSON,
    "*/*": JSON,
    "application/*": JSON,
    JSON: JSON,
    MSGPACK: MSGPACK,
    "application/x-msgpack": MSGPACK,
    "application/vnd.msgpack": MSGPACK,
    RAW: RAW,
}


def array(output: EncodeOutput) -> Array:
    """The numbers of a result."""
    return np.frombuffer(output.data, dtype="<f4").reshape(output.shape)


def form_of(request: web.Request) -> str:
    """JSON, MessagePack or raw floats, by Accept; raises InvalidRequest for anything else."""
    given = request.headers.get("Accept", "")
    for part in given.split(","):
        word = part.split(";")[0].strip().lower()
        if word in _FORMS:
            return _FORMS[word]
    raise InvalidRequest(
        f"Accept is {given[:80]!r}; this route writes {JSON}, {MSGPACK} and {RAW}", param="Accept"
    )


def vectors(
    request: web.Request,
    outputs: tuple[EncodeOutput, ...],
    wrap: Callable[[list[Any]], Any],
    form: str | None = None,
) -> web.Response:
    """Reply with vectors: ``wrap`` makes the body of them.

    JSON holds numbers; MessagePack float32 as bytes, little-endian; raw is nothing but these bytes, one vector
    after another, with the header X-Shape (``2,384``), and ``metadata``: as JSON, what ``wrap`` makes of no
    vectors, if that is an object (as vLLM's ``encoding_format: bytes`` has it).

    Args:
        form: a media type that wins over the request's Accept.
    """
    form = form or form_of(request)
    if form == RAW:
        shapes = {output.shape for output in outputs}
        if len(shapes) != 1:
            raise InvalidRequest(
                f"{RAW} needs results of one shape; these differ, use {MSGPACK}", param="Accept"
            )
        shape = ",".join(map(str, (len(outputs), *shapes.pop())))
        body = b"".join(output.data for output in outputs)
        headers = {"X-Shape": shape}
        about = msgspec.to_builtins(wrap([]))
        if isinstance(about, dict):
            headers["metadata"] = json.dumps(about | {"data": []})  # in ASCII
        return web.Response(body=body, content_type=RAW, headers=headers)
    if form == MSGPACK:
        return web.Response(
            body=_msgpack.encode(wrap([output.data for output in outputs])), content_type=MSGPACK
        )
    return web.Response(
        body=_json.encode(wrap([array(output).tolist() for output in outputs])), content_type=JSON
    )


def reply(request: web.Request, body: Any) -> web.Response:
    """Reply with anything that is no vector, as JSON or MessagePack."""
    if form_of(request) == MSGPACK:
        return web.Response(body=_msgpack.encode(body), content_type=MSGPACK)
    return web.Response(body=_json.encode(body), content_type=JSON)
