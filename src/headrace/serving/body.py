"""From the bytes of a request to a checked API request, or to an error that names the field."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, TypeVar, get_args

import msgspec
from aiohttp import web
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from headrace.errors import InvalidRequest, PayloadTooLarge, nearest

__all__ = ["content", "parse", "read"]

M = TypeVar("M", bound=BaseModel)
_decoder = msgspec.json.Decoder()
_SHOWN = 80  # characters of a wrong value that an error repeats
# What pydantic calls the kinds of errors whose text we say better.
_EXPECTED = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "none_required": "null",
}
_LIMITS = {
    "greater_than_equal": "at least {ge}",
    "greater_than": "a number above {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "a number below {lt}",
    "string_too_short": "{min_length} or more characters",
    "string_too_long": "at most {max_length} characters",
    "too_short": "{min_length} or more items",
    "too_long": "at most {max_length} items",
}


async def read(request: web.Request, schema: type[M]) -> M:
    """Read the body and check it against ``schema``.

    Raises PayloadTooLarge and InvalidRequest (with ``param``).
    """
    return parse(await content(request), schema)


async def content(request: web.Request) -> bytes:
    """The bytes of the body, decompressed. Raises PayloadTooLarge and InvalidRequest."""
    limit = request.app._client_max_size
    if (request.content_length or 0) > limit:
        raise PayloadTooLarge(
            f"the body has {request.content_length} bytes; the limit is {limit} (--max-body-bytes)"
        )
    try:
        data = await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise PayloadTooLarge(f"the body is over the limit of {limit} bytes (--max-body-bytes)") from error
    except web.RequestPayloadError as error:
        raise InvalidRequest(f"the body cannot be read: {error}", code="invalid_body") from error
    coding = request.headers.get("Content-Encoding", "identity").strip().lower()
    return data if coding in ("", "identity") else _decompress(data, coding, limit)


def _decompress(data: bytes, coding: str, limit: int) -> bytes:
    """``gzip`` or ``deflate`` (RFC 9110, 8.4.1), never more than ``limit`` bytes of work.

    Not aiohttp's: that goes on decompressing what the client sends after the limit was found out, and
    800 KB can become 800 MB, for which every other client waits.
    """
    # zlib's code for "gzip header" is 31; deflate is zlib's own format, or bare as some clients send it.
    bits = {"gzip": 31, "x-gzip": 31, "deflate": 15 if data[:1] == b"\x78" else -15}.get(coding)
    if bits is None:
        raise InvalidRequest(
            f"the body is compressed with {coding!r}; send it plain, or with gzip or deflate",
            param="Content-Encoding",
            code="unsupported_encoding",
        )
    parts, size = [], 0
    try:
        while data:  # gzip files may be several one after another
            stream = zlib.decompressobj(bits)
            parts.append(stream.decompress(data, limit + 1 - size))
            size += len(parts[-1])
            if size > limit:
                raise PayloadTooLarge(f"the body is over the limit of {limit} bytes (--max-body-bytes)")
            if not stream.eof:
                raise zlib.error("it ends too early")
            data = stream.unused_data
    except zlib.error as error:
        raise InvalidRequest(f"the body is no valid {coding}: {error}", code="invalid_body") from error
    return b"".join(parts)


def parse(data: bytes, schema: type[M]) -> M:
    """Bytes of JSON to a checked request; raises InvalidRequest."""
    try:
        body = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        what = "is nested too deeply" if isinstance(error, RecursionError) else f"is not valid JSON: {error}"
        raise InvalidRequest(f"the body {what}", code="invalid_json") from error
    if not isinstance(body, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {_kind(body)}", code="invalid_json")
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        raise _explain(error, body, schema) from error


def _explain(error: ValidationError, body: dict[str, Any], schema: type[BaseModel]) -> InvalidRequest:
    """The most specific of pydantic's findings, as one sentence about one field."""
    found = error.errors(include_url=False, include_context=True)
    unknown = [one for one in found if one["type"] == "extra_forbidden"]
    chosen = max(unknown or found, key=lambda one: _depth(_path(one, body)))
    path = _path(chosen, body)
    param = _param(path)
    kind, value = chosen["type"], chosen.get("input")
    if kind == "extra_forbidden":
        name = str(chosen["loc"][-1])
        known = _fields_at(schema, path[:-1])
        message = f"unknown field {param!r}{nearest(name, known)}"
        return InvalidRequest(message, param=param, code="unknown_field")
    if kind == "missing":
        return InvalidRequest(f"{param} is required", param=param, code="missing_field")
    if kind == "value_error":
        cause = chosen.get("ctx", {}).get("error")
        if isinstance(cause, FieldError):
            return InvalidRequest(str(cause), param=cause.param, code="unsupported_value")
        return InvalidRequest(f"{param}: {cause}", param=param)
    here = [one for one in found if _path(one, body) == path]
    beyond = next((one for one in here if one["type"] in _LIMITS), None)
    if beyond is not None:  # of the right type, so other branches of a union say nothing
        wanted = _LIMITS[beyond["type"]].format(**beyond.get("ctx", {}))
        message = f"{param} is {_show(value)}; expected {wanted}"
        return InvalidRequest(message, param=param, code="invalid_value")
    alternatives = dict.fromkeys(one["type"] for one in here)
    expected = " or ".join(dict.fromkeys(_EXPECTED[one] for one in alternatives if one in _EXPECTED))
    if kind not in _EXPECTED or not expected:
        expected = chosen["msg"].removeprefix("Input should be ").removeprefix("Value should ")
    return InvalidRequest(f"{param} is {_show(value)}; expected {expected}", param=param, code="invalid_type")


class FieldError(ValueError):
    """Raised inside a schema's validators for a field of the whole request."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


def _depth(path: Sequence[str | int]) -> tuple[int, int]:
    """How far a branch of a union got before it failed."""
    last = path[-1] if path else 0
    return len(path), last if isinstance(last, int) else 0


def _path(finding: ErrorDetails, body: Any) -> list[str | int]:
    """pydantic's location without the names of union branches: what the client wrote."""
    loc = finding["loc"]
    path: list[str | int] = []
    here = body
    for place, step in enumerate(loc):
        missing = finding["type"] == "missing" and place == len(loc) - 1
        if isinstance(here, dict) and isinstance(step, str) and (step in here or missing):
            path.append(step)
            here = here.get(step)
        elif isinstance(here, list) and isinstance(step, int) and step < len(here):
            path.append(step)
            here = here[step]
    return path


def _param(path: Sequence[str | int]) -> str:
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text or "body"


def _fields_at(schema: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """Names that are known where an unknown one was found."""
    here: list[type[BaseModel]] = [schema]
    for step in path:
        if isinstance(step, str):
            here = [
                model
                for parent in here
                if step in parent.model_fields
                for model in _models(parent.model_fields[step].annotation)
            ]
    return [name for model in here for name in model.model_fields]


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for arg in get_args(annotation) for model in _models(arg)]


def _kind(value: Any) -> str:
    names = {str: "a string", list: "a list", dict: "an object", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _show(value: Any) -> str:
    """A wrong value as JSON, cut short."""
    try:
        text = msgspec.json.encode(value).decode()
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError):
        text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
