"""Bodies and replies of ``/v1/chat/completions`` and ``/v1/completions``, whole and streamed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from headrace.client.exceptions import BadReply, InvalidArgument
from headrace.client.http1 import Reply
from headrace.client.operation import Job
from headrace.client.payloads import encode
from headrace.client.responses import parse_any

__all__ = ["Answer", "EventStream", "chat_bodies", "generation_jobs", "parse_answer", "text_bodies"]

Conversation = str | Sequence[Mapping[str, Any]] | Mapping[str, Any]
_json = msgspec.json.Decoder()


class Answer(msgspec.Struct, frozen=True):
    """What a model answered to one request.

    Attributes:
        index: position of the request.
        body: the reply as the API has it; of a stream, put together from its chunks.
        seconds: from sending to the last byte, retries included.
        first_token_s: to the first chunk with content; None without streaming.
        error: set instead of ``body`` when errors are returned rather than raised.
    """

    index: int
    body: dict[str, Any]
    seconds: float = 0.0
    first_token_s: float | None = None
    error: Exception | None = None

    @property
    def text(self) -> str:
        """Content of the first choice. Raises the error if there is one."""
        if self.error is not None:
            raise self.error
        choice = self.body["choices"][0]
        return str(choice["message"]["content"] or "") if "message" in choice else str(choice["text"])

    @property
    def finish_reason(self) -> str | None:
        return self.body["choices"][0].get("finish_reason") if self.body else None

    @property
    def usage(self) -> dict[str, Any]:
        return self.body.get("usage") or {}


def chat_bodies(
    conversations: Iterable[Conversation], model: str | None, params: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Request bodies of texts (one user message), message lists, or whole bodies."""
    for i, given in enumerate(conversations):
        if isinstance(given, str):
            body: dict[str, Any] = {"messages": [{"role": "user", "content": given}]}
        elif isinstance(given, Mapping):
            body = dict(given)
        elif isinstance(given, Sequence):
            body = {"messages": list(given)}
        else:
            raise InvalidArgument(
                f"request {i} is {type(given).__name__}; expected text, a list of messages or a request body"
            )
        yield _whole(body, "messages", i, model, params)


def text_bodies(
    prompts: Iterable[str | Sequence[int] | Mapping[str, Any]], model: str | None, params: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Request bodies of texts, token ids, or whole bodies."""
    for i, given in enumerate(prompts):
        body = dict(given) if isinstance(given, Mapping) else {"prompt": given}
        yield _whole(body, "prompt", i, model, params)


def _whole(
    body: dict[str, Any], needed: str, index: int, model: str | None, params: Mapping[str, Any]
) -> dict[str, Any]:
    body = {**params, **body}
    if model is not None:
        body.setdefault("model", model)
    for name in ("model", needed):
        if not body.get(name):
            raise InvalidArgument(f"request {index} has no {name!r}", param=name)
    return body


def generation_jobs(path: str, bodies: Iterable[dict[str, Any]], stream: bool) -> Iterator[Job]:
    """One job a body; with ``stream``, events are asked for and put together again."""
    for index, body in enumerate(bodies):
        if stream:
            options = {"include_usage": True, **(body.get("stream_options") or {})}
            body = {**body, "stream": True, "stream_options": options}
        elif body.get("stream"):
            raise InvalidArgument(
                f"request {index} sets stream; give stream=True to the call", param="stream"
            )
        sink = EventStream if stream else None
        yield Job(index, path, encode(body, f"request {index}"), index, 1, "POST", sink)


def parse_answer(job: Job, reply: Reply) -> Answer:
    """Raises BadReply when the reply holds no choices."""
    first = None
    if isinstance(reply.stream, EventStream):
        body, first = reply.stream.result(), reply.stream.first_token_s
    else:
        body, _ = parse_any(job, reply)
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or not choices:
        raise BadReply(f"the reply to request {job.index} has no choices: {str(body)[:80]!r}")
    if not all(isinstance(c, dict) and (isinstance(c.get("message"), dict) or "text" in c) for c in choices):
        raise BadReply(f"a choice in the reply to request {job.index} holds neither message nor text")
    return Answer(job.index, body, reply.seconds, first)


class EventStream:
    """Server-sent events (WHATWG HTML, 9.2) of one completion, put together into the reply that it would be.

    Strings of the deltas are joined, tool calls by their index, logprobs' lists; the last value of anything
    else wins.
    """

    def __init__(self) -> None:
        self.complete = False
        self.first_token_s: float | None = None
        self._begun = time.perf_counter()
        self._rest = b""
        self._reply: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}

    def feed(self, data: bytes) -> None:
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                self._event(line[5:].strip())

    def _event(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.complete = True
            return
        try:
            chunk = _json.decode(data)
        except (msgspec.MsgspecError, ValueError) as error:
            raise BadReply(f"an event is not JSON: {error}; it begins {data[:80]!r}") from None
        if not isinstance(chunk, dict) or chunk.get("error"):
            raise BadReply(f"the stream broke off with an error: {data[:400].decode('utf-8', 'replace')}")
        choices = chunk.pop("choices", None) or []
        self._reply.update({key: value for key, value in chunk.items() if value is not None})
        for part in choices:
            self._merge(part)

    def _merge(self, part: dict[str, Any]) -> None:
        index = part.pop("index", 0)
        choice = self._choices.setdefault(index, {"index": index})
        delta = part.pop("delta", None)
        if self.first_token_s is None and (part.get("text") or _says(delta)):
            self.first_token_s = time.perf_counter() - self._begun
        if "text" in part:
            choice["text"] = choice.get("text", "") + (part.pop("text") or "")
        if delta is not None:
            _join(choice.setdefault("message", {"role": "assistant", "content": None}), delta)
        logprobs = part.pop("logprobs", None)
        if logprobs:
            _join(choice.setdefault("logprobs", {}), logprobs)
        for key, value in part.items():
            if value is not None or key not in choice:
                choice[key] = value

    def result(self) -> dict[str, Any]:
        kind = str(self._reply.get("object", "chat.completion")).removesuffix(".chunk")
        return {**self._reply, "object": kind, "choices": [self._choices[i] for i in sorted(self._choices)]}


def _says(delta: Any) -> bool:
    return isinstance(delta, dict) and any(value for key, value in delta.items() if key != "role")


def _join(whole: dict[str, Any], delta: dict[str, Any]) -> None:
    for key, value in delta.items():
        old = whole.get(key)
        if key == "tool_calls" and value:
            _join_calls(whole.setdefault(key, []), value)
        elif value is None:
            whole.setdefault(key, None)
        elif isinstance(old, str) and isinstance(value, str) and key not in ("role", "id", "type"):
            whole[key] = old + value
        elif isinstance(old, list) and isinstance(value, list):
            old.extend(value)
        elif isinstance(old, dict) and isinstance(value, dict):
            _join(old, value)
        else:
            whole[key] = value


def _join_calls(calls: list[dict[str, Any]], parts: list[dict[str, Any]]) -> None:
    for part in parts:
        part = dict(part)
        index = part.pop("index", len(calls) - 1)
        while len(calls) <= index:
            calls.append({})
        _join(calls[index], part)
