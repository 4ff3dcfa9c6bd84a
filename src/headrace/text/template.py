"""Chat templates: messages to the prompt text that a model was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes

from headrace.errors import HeadraceError, InvalidRequest, Unprocessable
from headrace.text import sandbox
from headrace.text.sources import TextSources

__all__ = ["ChatTemplate", "load_template_text"]

_RESERVED = frozenset(("messages", "tools", "documents", "add_generation_prompt"))
_REASONING = ("reasoning_content", "reasoning", "thinking")
_COMPILING = (jinja2.TemplateError, RecursionError, SyntaxError, MemoryError, OverflowError, ValueError)
_MARK = "\ue000headrace-continue\ue000"  # private use: no model text holds it


class ChatTemplate:
    """A model's chat template, or several named ones, compiled once and rendered from any thread.

    Args:
        templates: name -> jinja2 source; ``default``, and for instance ``tool_use``.
        special_tokens: ``bos_token``, ``eos_token``... as variables of the template.

    Raises InvalidRequest (param ``chat_template``) for a syntax error.
    """

    def __init__(
        self,
        templates: Mapping[str, str],
        special_tokens: Mapping[str, str] | None = None,
        budget: sandbox.Budget | None = None,
    ) -> None:
        self.templates = dict(templates)
        self._special = dict(special_tokens or {})
        self._budget = budget or sandbox.Budget()
        self._environment = sandbox.environment()
        self._compiled = {name: self._compile(source) for name, source in self.templates.items()}
        self._wants_parts = {n: expects_parts(self._environment, t) for n, t in self.templates.items()}

    @classmethod
    def from_sources(
        cls, sources: TextSources, special_tokens: Mapping[str, str], override: str | None = None
    ) -> ChatTemplate:
        """The checkpoint's own templates, or the one that the operator gave (a file, or the text itself)."""
        templates = sources.templates if override is None else {"default": load_template_text(override)}
        return cls(templates, special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text. It holds its special tokens already: encode it without adding more.

        Args:
            messages: OpenAI's form; text parts become what the template expects.
            continue_final_message: leave the last message open for the model to go on.
            kwargs: further variables (``enable_thinking``...).

        Raises InvalidRequest naming the field when the template refuses the messages, Unprocessable when the
        model has no chat template.
        """
        name = "tool_use" if tools and "tool_use" in self._compiled else "default"
        if name not in self._compiled:
            raise Unprocessable(self._no_template(), param="messages")
        if taken := _RESERVED & set(kwargs or ()):
            raise InvalidRequest(
                f"chat_template_kwargs may not set {sorted(taken)[0]!r}; use the request's own field",
                param="chat_template_kwargs",
            )
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message needs add_generation_prompt=false: one either continues or begins",
                param="continue_final_message",
            )
        tests_text = "is string" in self.templates[name]
        prepared = prepare_messages(messages, wants_parts=self._wants_parts[name], tests_text=tests_text)
        if continue_final_message:
            _mark_last(prepared)
        variables = {
            **self._special,
            **(kwargs or {}),
            "messages": prepared,
            "tools": [dict(tool) for tool in tools] if tools else None,
            "documents": [dict(document) for document in documents] if documents else None,
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._run(self._compiled[name], variables)
        return _cut_at_mark(text) if continue_final_message else text

    def _compile(self, source: str) -> jinja2.Template:
        try:
            return self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise InvalidRequest(
                f"the chat template has a syntax error in line {error.lineno}: {error.message}",
                param="chat_template",
            ) from None
        except _COMPILING as error:
            raise InvalidRequest(
                f"the chat template cannot be compiled: {error}", param="chat_template"
            ) from None

    def _run(self, template: jinja2.Template, variables: dict[str, Any]) -> str:
        """Render within the budget; whatever the template raises is the request's error, not the server's."""
        parts: list[str] = []
        size = 0
        try:
            with sandbox.spending(self._budget):
                for part in template.generate(variables):
                    size += len(part)
                    if size > self._budget.characters:
                        raise sandbox.Exhausted(
                            f"the prompt is longer than {self._budget.characters} characters"
                        )
                    parts.append(part)
        except HeadraceError:
            raise
        except jinja2.UndefinedError as error:
            raise InvalidRequest(
                f"the chat template needs something that the messages lack: {error.message}", param="messages"
            ) from None
        except (jinja2.TemplateError, RecursionError, MemoryError) as error:
            reason = str(error) or type(error).__name__
            raise InvalidRequest(
                f"the chat template refuses the messages: {reason}", param="messages"
            ) from None
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise InvalidRequest(
                f"the chat template fails on these messages: {type(error).__name__}: {error}",
                param="messages",
            ) from None
        return "".join(parts)

    def _no_template(self) -> str:
        named = f" named 'default' (there are {', '.join(sorted(self._compiled))})" if self._compiled else ""
        return (
            f"this model has no chat template{named}; use /v1/completions, or start the server with "
            "--chat-template"
        )


def load_template_text(value: str) -> str:
    """An operator's template: the text itself, or the path of a file that holds it."""
    if "\n" in value or "{" in value:
        return value
    path = Path(value).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"chat_template {value!r} is neither a template nor a readable file: {error}",
            param="chat_template",
        ) from None


def expects_parts(env: jinja2.Environment, source: str) -> bool:
    """True when the template goes over ``message.content`` in a loop, so that it takes lists of parts."""
    return any(_is_content(_unfiltered(loop.iter)) for loop in env.parse(source).find_all(nodes.For))


def _unfiltered(node: nodes.Node | None) -> nodes.Node | None:
    while isinstance(node, (nodes.Filter, nodes.Test)):
        node = node.node
    return node


def _is_content(node: nodes.Node | None) -> bool:
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Name) and node.name == "content"


def prepare_messages(
    messages: Sequence[Mapping[str, Any]], *, wants_parts: bool, tests_text: bool = False
) -> list[dict[str, Any]]:
    """Messages as templates expect them.

    Text parts are joined by line breaks for templates that take text. A template that loops over content gets
    the list, and a plain text as a list of one unless it tests for text (``tests_text``). Tool call arguments
    become objects, a content of null becomes "", and reasoning is found under every name that templates use.
    """
    prepared = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequest(f"messages[{index}] needs a role", param=f"messages[{index}].role")
        copy = dict(message)
        copy["content"] = _content(message.get("content"), index, wants_parts, tests_text)
        reasoning = next((copy[name] for name in _REASONING if copy.get(name) is not None), None)
        if reasoning is not None:
            copy |= {"reasoning_content": reasoning, "thinking": copy.get("thinking", reasoning)}
        if calls := message.get("tool_calls"):
            copy["tool_calls"] = [_tool_call(call, index, number) for number, call in enumerate(calls)]
        elif "tool_calls" in copy:
            del copy["tool_calls"]  # null or empty: templates ask whether it is there
        prepared.append(copy)
    return prepared


def _content(value: Any, index: int, wants_parts: bool, tests_text: bool) -> Any:
    if value is None or isinstance(value, str):
        text = value or ""
        return [{"type": "text", "text": text}] if wants_parts and not tests_text else text
    field = f"messages[{index}].content"
    if not isinstance(value, (list, tuple)):
        raise InvalidRequest(
            f"{field} must be a text or a list of parts, not {type(value).__name__}", param=field
        )
    parts = [_text_part(part, f"{field}[{number}]") for number, part in enumerate(value)]
    return parts if wants_parts else "\n".join(part["text"] for part in parts)


def _text_part(part: Any, field: str) -> dict[str, Any]:
    """One content part as ``{"type": "text", "text": ...}``; a refusal is the assistant's own text."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else None
    key = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}.get(str(kind))
    if key is None:
        raise InvalidRequest(f"{field} is of type {kind!r}; this model takes text parts only", param=field)
    if not isinstance(part.get(key), str):
        raise InvalidRequest(f"{field}.{key} must be a text", param=f"{field}.{key}")
    return {"type": "text", "text": part[key]}


def _tool_call(call: Any, index: int, number: int) -> Any:
    """A tool call whose arguments are an object: OpenAI sends JSON text, templates write JSON themselves."""
    field = f"messages[{index}].tool_calls[{number}]"
    if not isinstance(call, Mapping):
        raise InvalidRequest(f"{field} must be an object", param=field)
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError) as error:
        param = f"{field}.function.arguments"
        raise InvalidRequest(f"{param} is no valid JSON: {error}", param=param) from None
    return {**call, "function": {**function, "arguments": arguments}}


def _mark_last(messages: list[dict[str, Any]]) -> None:
    """Put a mark at the end of the last message, to find the place in the rendered text."""
    if not messages:
        raise InvalidRequest("continue_final_message needs a message to continue", param="messages")
    last = messages[-1]
    if isinstance(last["content"], str):
        last["content"] += _MARK
    elif last["content"]:
        last["content"][-1]["text"] += _MARK


def _cut_at_mark(text: str) -> str:
    """Everything up to the mark. Templates may trim the message, never the mark."""
    before, mark, _ = text.rpartition(_MARK)
    if not mark:
        raise InvalidRequest(
            "the chat template leaves out the last message, so it cannot be continued", param="messages"
        )
    return before
