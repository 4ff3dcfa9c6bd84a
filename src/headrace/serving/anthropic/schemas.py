"""The body of POST /v1/messages, and the chat request that it amounts to."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field, ValidationError

from headrace.errors import InvalidRequest
from headrace.serving.openai.fields import ApiModel, acts, harmless, refused
from headrace.serving.openai.schemas import ChatRequest

__all__ = ["MessagesRequest", "to_chat"]


class AnthropicMessage(ApiModel):
    """One turn of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class MessagesRequest(ApiModel):
    """POST /v1/messages"""

    model: str = Field(
        description="A served name; GET /v1/models lists them.", json_schema_extra={"effect": "acted on"}
    )
    messages: list[AnthropicMessage] = Field(
        description="The conversation: text, tool_use, tool_result and thinking blocks.",
        min_length=1,
        json_schema_extra={"effect": "acted on"},
    )
    max_tokens: int = Field(
        description="Output tokens at most.", ge=1, json_schema_extra={"effect": "acted on"}
    )
    system: str | list[dict[str, Any]] | None = acts(None, "A system message in front.")
    stop_sequences: list[str] | None = acts(None, "Output ends before the first that occurs.")
    stream: bool | None = acts(None, "Server-sent events instead of one reply.")
    temperature: float | None = acts(None, "0 is greedy.")
    top_k: int | None = acts(None, "The k most likely tokens.")
    top_p: float | None = acts(None, "Nucleus, in (0, 1].")
    tools: list[dict[str, Any]] | None = acts(
        None, "Tools with an input_schema; the server's own kinds are refused."
    )
    tool_choice: dict[str, Any] | None = acts(None, "auto, any, tool or none; disable_parallel_tool_use.")
    thinking: dict[str, Any] | None = acts(
        None,
        "`enabled` with budget_tokens; `disabled` sets enable_thinking to false; `adaptive` changes nothing.",
    )
    output_config: dict[str, Any] | None = acts(None, "`format` of type json_schema; `effort`.")
    output_format: dict[str, Any] | None = acts(None, "Older place of `output_config.format`.")
    metadata: dict[str, Any] | None = harmless("For the caller's own books.")
    service_tier: str | None = harmless("There is one tier.")
    cache_control: Any = harmless("Prefixes are cached by content.")
    inference_geo: str | None = refused(
        "where this server stands is not known to it", "global", "not_available"
    )
    container: Any = refused("no containers run here")
    mcp_servers: Any = refused("no MCP servers are called from here", [])
    context_management: Any = refused("nothing of the kind runs here")


def to_chat(body: MessagesRequest) -> ChatRequest:
    """The same as a chat request; raises InvalidRequest."""
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system, "system")})
    for number, message in enumerate(body.messages):
        messages += _message(message, f"messages[{number}]")
    thinking = body.thinking or {}
    kind = thinking.get("type")
    config = body.output_config or {}
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": messages,
        "max_tokens": body.max_tokens,
        "stop": body.stop_sequences or None,
        "stream": body.stream,
        "temperature": body.temperature,
        "top_k": body.top_k,
        "top_p": body.top_p,
        "tools": _tools(body.tools),
        "response_format": _format(config.get("format") or body.output_format),
        "reasoning_effort": config.get("effort"),
        "thinking_token_budget": thinking.get("budget_tokens") if kind == "enabled" else None,
        "chat_template_kwargs": {"enable_thinking": kind == "enabled"}
        if kind in ("enabled", "disabled")
        else None,
        **_choice(body.tool_choice),
    }
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(str(step) for step in first["loc"])
        raise InvalidRequest(f"{path}: {first['msg']}", param=path or None) from error


def _message(message: AnthropicMessage, param: str) -> list[dict[str, Any]]:
    """One turn may be several messages: results of tools are messages of their own."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results: list[dict[str, Any]] = []
    texts: list[str] = []
    turn: dict[str, Any] = {"role": message.role}
    for number, block in enumerate(message.content):
        where = f"{param}.content[{number}]"
        match block:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": "thinking", "thinking": str(text)}:
                turn["reasoning_content"] = turn.get("reasoning_content", "") + text
            case {"type": "redacted_thinking"}:
                pass
            case {"type": "tool_use", "id": str(name_id), "name": str(name), "input": dict(given)}:
                function = {"name": name, "arguments": json.dumps(given, ensure_ascii=False)}
                turn.setdefault("tool_calls", []).append(
                    {"id": name_id, "type": "function", "function": function}
                )
            case {"type": "tool_result", "tool_use_id": str(name_id)}:
                text = _text(block.get("content") or "", f"{where}.content")
                text = f"Error: {text}" if block.get("is_error") else text
                results.append({"role": "tool", "tool_call_id": name_id, "content": text})
            case _:
                raise InvalidRequest(
                    f"{where} is of type {json.dumps(block.get('type'))[:60]} or lacks a field of it; expected text, "
                    "thinking, tool_use or tool_result (this model reads text only)",
                    param=where,
                )
    if texts:
        turn["content"] = "\n".join(texts)
    return [*results, turn] if len(turn) > 1 else results


def _text(content: Any, param: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(one, dict) and one.get("type") == "text" and isinstance(one.get("text"), str)
        for one in content
    ):
        return "\n".join(one["text"] for one in content)
    raise InvalidRequest(f"{param} must be a text or a list of text blocks", param=param)


def _tools(given: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    tools = []
    for number, tool in enumerate(given or ()):
        if tool.get("type", "custom") != "custom" or "input_schema" not in tool:
            raise InvalidRequest(
                f"tools[{number}] needs name and input_schema; tools that run at a provider are not offered here",
                param=f"tools[{number}]",
            )
        function = {key: tool[key] for key in ("name", "description", "strict") if key in tool}
        tools.append({"type": "function", "function": function | {"parameters": tool["input_schema"]}})
    return tools or None


def _choice(given: dict[str, Any] | None) -> dict[str, Any]:
    parallel = {"parallel_tool_calls": False} if (given or {}).get("disable_parallel_tool_use") else {}
    match given:
        case None:
            return parallel
        case {"type": "auto" | "none" as kind}:
            return {"tool_choice": kind, **parallel}
        case {"type": "any"}:
            return {"tool_choice": "required", **parallel}
        case {"type": "tool", "name": str(name)}:
            return {"tool_choice": {"type": "function", "function": {"name": name}}, **parallel}
    raise InvalidRequest("tool_choice.type must be auto, any, tool (with name) or none", param="tool_choice")


def _format(given: Any) -> dict[str, Any] | None:
    if given is None:
        return None
    if not isinstance(given, dict) or given.get("type") != "json_schema" or "schema" not in given:
        raise InvalidRequest(
            "output_config.format must be of type json_schema with a schema", param="output_config"
        )
    return {
        "type": "json_schema",
        "json_schema": {"name": "output", "schema": given["schema"], "strict": True},
    }
