"""What OpenAI's API answers, as typed structs that msgspec writes in microseconds."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from headrace.types import FinishReason, Usage

__all__ = [
    "CallReply",
    "ChatChoice",
    "ChatChunk",
    "ChatDelta",
    "ChatLogprobs",
    "ChatMessage",
    "ChatReply",
    "ChunkChoice",
    "FunctionReply",
    "TextChoice",
    "TextLogprobs",
    "TextReply",
    "TokenEntry",
    "UsageReply",
    "encode",
    "ending",
    "event",
    "finish",
    "usage_reply",
]

_encoder = msgspec.json.Encoder()
encode = _encoder.encode
DONE = b"data: [DONE]\n\n"


def event(chunk: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + encode(chunk) + b"\n\n"


class UsageReply(msgspec.Struct):
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]
    completion_tokens_details: dict[str, int]


def usage_reply(usage: Usage, reasoning_tokens: int = 0) -> UsageReply:
    """Usage in the API's words."""
    return UsageReply(
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.total_tokens,
        {"cached_tokens": usage.cached_tokens},
        {"reasoning_tokens": reasoning_tokens},
    )


def finish(reason: FinishReason | None) -> str | None:
    """`stop` or `length`; the other reasons are errors and never a reply."""
    return None if reason is None else reason.value


class TokenEntry(msgspec.Struct):
    """One candidate at one position."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TokenEntry] | UnsetType = UNSET


class ChatLogprobs(msgspec.Struct):
    """Log-probabilities of a choice or delta."""

    content: list[TokenEntry]
    refusal: None = None


class FunctionReply(msgspec.Struct):
    """Name and arguments (JSON text) of a call; in streams ``arguments`` is what is new."""

    arguments: str
    name: str | UnsetType = UNSET


class CallReply(msgspec.Struct):
    """A tool call, or in streams what is new of one: ``id``, ``type`` and name come first and once."""

    function: FunctionReply
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    index: int | UnsetType = UNSET


class ChatMessage(msgspec.Struct):
    """The assistant's turn."""

    role: str
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[CallReply] | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    """One answer."""

    index: int
    message: ChatMessage
    finish_reason: str | None
    logprobs: ChatLogprobs | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatReply(msgspec.Struct, tag_field="object", tag="chat.completion"):
    """The reply to a chat request that does not stream."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageReply
    system_fingerprint: str | None = None
    service_tier: str | UnsetType = UNSET
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET
    prompt_logprobs: list[Any] | UnsetType = UNSET
    warnings: tuple[str, ...] | UnsetType = UNSET


class ChatDelta(msgspec.Struct):
    """What is new of the assistant's turn."""

    content: str | UnsetType = UNSET
    role: str | UnsetType = UNSET
    refusal: UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[CallReply] | UnsetType = UNSET


class ChunkChoice(msgspec.Struct):
    """What is new of one answer."""

    index: int
    delta: ChatDelta
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: tuple[int, ...] | UnsetType = UNSET


class ChatChunk(msgspec.Struct, tag_field="object", tag="chat.completion.chunk"):
    """One event of a chat stream."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: UsageReply | UnsetType | None = UNSET
    system_fingerprint: str | None = None
    service_tier: str | UnsetType = UNSET
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET
    warnings: tuple[str, ...] | UnsetType = UNSET


class TextLogprobs(msgspec.Struct):
    """Log-probabilities in the form of the older API: parallel lists, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class TextChoice(msgspec.Struct):
    """One completion, or what is new of it."""

    index: int
    text: str
    finish_reason: str | None = None
    logprobs: TextLogprobs | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | tuple[int, ...] | UnsetType = UNSET
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET
    prompt_logprobs: list[Any] | UnsetType = UNSET


class TextReply(msgspec.Struct, tag_field="object", tag="text_completion"):
    """The reply to a completion request, and each event of its stream."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: UsageReply | UnsetType | None = UNSET
    system_fingerprint: str | None = None
    warnings: tuple[str, ...] | UnsetType = UNSET


def ending(chunk: ChatChunk | TextReply, usage: UsageReply | None, warnings: tuple[str, ...]) -> bytes:
    """The last events of a stream: a chunk without choices, if there is something left to tell, and its end."""
    if usage is None and not warnings:
        return DONE
    chunk.warnings = warnings or UNSET
    if usage is not None:
        chunk.usage = usage
    return event(chunk) + DONE
