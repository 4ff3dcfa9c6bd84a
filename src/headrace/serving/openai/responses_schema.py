"""The body of POST /v1/responses, and the chat request that it amounts to."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from headrace.errors import InvalidRequest
from headrace.serving.body import FieldError
from headrace.serving.openai.fields import ApiModel, acts, harmless, refused
from headrace.serving.openai.schemas import ChatRequest

__all__ = ["ResponsesRequest", "to_chat"]

_HERE = "nothing of the kind runs here"
_PARTS = {
    "input_text": "text",
    "output_text": "text",
    "text": "text",
    "refusal": "refusal",
    "reasoning_text": "text",
}


class ResponsesRequest(ApiModel):
    """POST /v1/responses"""

    model: str = Field(
        description="A served name; GET /v1/models lists them.", json_schema_extra={"effect": "acted on"}
    )
    input: str | list[dict[str, Any]] = Field(
        description="Text, or items: messages, function_call, function_call_output, reasoning.",
        json_schema_extra={"effect": "acted on"},
    )
    instructions: str | None = acts(None, "A system message in front; not carried to later responses.")
    previous_response_id: str | None = acts(None, "Go on from a stored response.")
    store: bool | None = acts(None, "Keep the response in memory (default true), bounded.")
    stream: bool | None = acts(None, "Typed server-sent events instead of one reply.")
    stream_options: dict[str, Any] | None = harmless("Chunks are never padded; usage is always told.")
    max_output_tokens: int | None = acts(None, "Output tokens at most, thinking included.", ge=1)
    temperature: float | None = acts(None, "0 is greedy.")
    top_p: float | None = acts(None, "Nucleus, in (0, 1].")
    seed: int | None = acts(None, "The same seed gives the same text in any batch.")
    tools: list[dict[str, Any]] | None = acts(None, "Functions; other kinds are refused.")
    tool_choice: str | dict[str, Any] | None = acts(None, "As in chat completions.")
    parallel_tool_calls: bool | None = acts(None, "False: at most one call in a turn (default true).")
    text: dict[str, Any] | None = acts(None, "`format`: text, json_object or json_schema.")
    reasoning: dict[str, Any] | None = acts(None, "`effort` goes to the chat template.")
    include: list[str] | None = acts(
        None, "Reasoning is told in the clear; log-probabilities are refused, other parts do not occur here."
    )
    metadata: dict[str, Any] | None = acts(None, "Handed back.")
    truncation: Literal["auto", "disabled"] | None = acts(None, "`disabled`; `auto` is refused.")
    top_logprobs: int | None = refused("use chat completions", 0)
    background: bool | None = refused("responses are answered at once", False)
    background_options: Any = refused(_HERE)
    conversation: Any = refused("use previous_response_id")
    context_management: Any = refused(_HERE)
    prompt: Any = refused("no prompts are stored here")
    moderation: Any = refused(_HERE)
    image: Any = refused(_HERE)
    access_programs: Any = refused(_HERE)
    max_tool_calls: int | None = harmless("Only built-in tools count, and there are none.")
    service_tier: str | None = harmless("There is one tier.")
    user: str | None = harmless("For the caller's own books.")
    safety_identifier: str | None = harmless("For the caller's own books.")
    prompt_cache_key: str | None = harmless("Prefixes are cached by content.")
    prompt_cache_options: Any = harmless("Prefixes are cached as memory allows.")
    prompt_cache_retention: str | None = harmless("Prefixes are cached as memory allows.")

    @model_validator(mode="after")
    def _check(self) -> ResponsesRequest:
        if self.truncation == "auto":
            raise FieldError(
                "truncation", "truncation 'auto' is not supported: nothing is cut without being told"
            )
        if "message.output_text.logprobs" in (self.include or ()):
            raise FieldError(
                "include", "include: message.output_text.logprobs is not supported here; use chat completions"
            )
        return self


def to_chat(body: ResponsesRequest, before: list[dict[str, Any]]) -> tuple[ChatRequest, list[dict[str, Any]]]:
    """The same as a chat request, and its messages without the instructions. Raises InvalidRequest.

    Args:
        before: messages of the response that this one goes on.
    """
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    messages = before + _messages(items)
    first = [{"role": "system", "content": body.instructions}] if body.instructions else []
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": first + messages,
        "stream": body.stream,
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "seed": body.seed,
        "tools": _tools(body.tools),
        "tool_choice": body.tool_choice,
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": _format(body.text),
        "reasoning_effort": (body.reasoning or {}).get("effort"),
        "verbosity": (body.text or {}).get("verbosity"),
    }
    if not body.tools and body.tool_choice == "auto":
        fields["tool_choice"] = None
    try:
        return ChatRequest.model_validate(fields), messages
    except ValidationError as error:
        first_error = error.errors(include_url=False)[0]
        path = ".".join(str(step) for step in first_error["loc"])
        raise InvalidRequest(
            f"{path.replace('messages', 'input', 1)}: {first_error['msg']}", param="input"
        ) from error


def _messages(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items as chat messages: calls and thoughts belong to one assistant's message."""
    messages: list[dict[str, Any]] = []
    open_turn: dict[str, Any] | None = None  # the assistant's message that further items may join
    for number, item in enumerate(items):
        param = f"input[{number}]"
        kind = item.get("type", "message")
        if kind == "function_call_output":
            output = item.get("output")
            text = output if isinstance(output, str) else _parts(output, f"{param}.output")
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": text})
            open_turn = None
            continue
        if kind == "message" and item.get("role") != "assistant":
            messages.append(
                {"role": item.get("role"), "content": _parts(item.get("content"), f"{param}.content")}
            )
            open_turn = None
            continue
        if kind not in ("message", "function_call", "reasoning"):
            raise InvalidRequest(
                f"{param}.type is {json.dumps(kind)[:60]}; expected message, function_call, function_call_output or "
                "reasoning",
                param=f"{param}.type",
            )
        if open_turn is None or (kind == "message" and open_turn.get("content") is not None):
            open_turn = {"role": "assistant"}
            messages.append(open_turn)
        _join(open_turn, kind, item, param)
    return [one for one in messages if len(one) > 1]


def _join(turn: dict[str, Any], kind: str, item: dict[str, Any], param: str) -> None:
    if kind == "message":
        turn["content"] = _parts(item.get("content"), f"{param}.content")
    elif kind == "reasoning":
        if text := _parts(item.get("content") or [], f"{param}.content"):
            turn["reasoning_content"] = text
    else:
        function = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
        turn.setdefault("tool_calls", []).append(
            {"id": item.get("call_id"), "type": "function", "function": function}
        )


def _parts(content: Any, param: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{param} must be a text or a list of parts", param=param)
    texts = []
    for part in content:
        key = _PARTS.get(str(part.get("type"))) if isinstance(part, dict) else None
        if key is None or not isinstance(part.get(key), str):
            raise InvalidRequest(
                f"{param} holds a part that is no text; this model reads text only", param=param
            )
        texts.append(part[key])
    return "\n".join(texts)


def _tools(given: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    tools = []
    for number, tool in enumerate(given or ()):
        if tool.get("type") != "function":
            raise InvalidRequest(
                f"tools[{number}].type is {json.dumps(tool.get('type'))[:60]}; only functions run outside this server",
                param=f"tools[{number}].type",
            )
        names = ("name", "description", "parameters", "strict")
        tools.append({"type": "function", "function": {name: tool[name] for name in names if name in tool}})
    return tools or None


def _format(text: dict[str, Any] | None) -> dict[str, Any] | None:
    given = (text or {}).get("format")
    if not isinstance(given, dict) or given.get("type") != "json_schema":
        return given
    return {
        "type": "json_schema",
        "json_schema": {key: value for key, value in given.items() if key != "type"},
    }
