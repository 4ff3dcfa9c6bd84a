"""Which format a model writes: from what was configured, else from its chat template and architecture."""

from __future__ import annotations

from collections.abc import Callable

from headrace.serving.parsers.formats import build, reasoning_name, tool_name
from headrace.serving.parsers.grammar import Format
from headrace.serving.parsers.machine import Thinking

__all__ = ["choose", "detect_reasoning", "detect_tools", "thinking_of"]


def _has(*marks: str) -> Callable[[str, str], bool]:
    return lambda template, architecture: all(mark in template for mark in marks)


# In this order: the first that holds decides.
_TOOLS: tuple[tuple[str, Callable[[str, str], bool]], ...] = (
    ("harmony", lambda template, architecture: architecture.startswith("GptOss")),
    ("harmony", _has("<|channel|>", "<|message|>")),
    ("qwen3_coder", _has("<function=", "<parameter=")),
    ("glm4_moe", _has("<arg_key>")),
    ("deepseek_v3", _has("<｜tool▁call▁begin｜>", "```json")),
    ("deepseek_v31", _has("<｜tool▁call▁begin｜>")),
    ("kimi_k2", _has("<|tool_calls_section_begin|>")),
    ("mistral_args", _has("[TOOL_CALLS]", "[ARGS]")),
    ("mistral", _has("[TOOL_CALLS]")),
    ("gemma", _has("<start_function_call>")),
    ("gemma4", _has("<|tool_call>", "<tool_call|>")),
    (
        "granite",
        lambda template, architecture: architecture.startswith("Granite") and "<|tool_call|>" in template,
    ),
    ("phi4", _has("<|tool_call|>")),
    ("phi4", lambda template, architecture: architecture.startswith("Phi") and "<|tool|>" in template),
    ("pythonic", _has("<|python_start|>")),
    ("pythonic", _has("func_name1(")),
    ("llama3_json", _has("<|python_tag|>")),
    ("llama3_json", _has('{"name": function name, "parameters"')),
    ("hermes", _has("<tool_call>")),
)


def detect_tools(template: str, architecture: str) -> str | None:
    """Name of the tool format that a template writes; None when it shows none."""
    return next((name for name, holds in _TOOLS if holds(template, architecture)), None)


def detect_reasoning(template: str, architecture: str, tools: str | None) -> str | None:
    """Name of the reasoning format; None when the template shows none."""
    if tools == "harmony":
        return "harmony"
    if "[THINK]" in template:
        return "mistral"
    if "<|channel>" in template:
        return "gemma4"
    if "</think>" not in template:
        return None
    if "<think>" not in template:
        return "deepseek_r1"
    return "deepseek_v3" if tools in ("deepseek_v3", "deepseek_v31", "kimi_k2") else "think"


def choose(template: str, architecture: str, tools: str | None, reasoning: str | None) -> Format:
    """The format of a model.

    Args:
        template: its chat templates, joined.
        tools, reasoning: names that were configured; ``none`` turns it off; None: found out.

    Raises ConfigError for a name that is not known. Without any sign of a tool format it is ``hermes``.
    """
    wanted = detect_tools(template, architecture) or "hermes" if tools is None else tools
    calls = None if wanted == "none" else tool_name(wanted)
    if reasoning is None:
        thoughts = detect_reasoning(template, architecture, calls)
    else:
        thoughts = None if reasoning == "none" else reasoning_name(reasoning)
    return build(calls, thoughts)


def thinking_of(format: Format, prompt: str, continued: str | None) -> Thinking:
    """How a rendered prompt leaves the thinking.

    Args:
        continued: text of the assistant's message that the answer goes on, if it does.
    """
    reasoning = format.reasoning
    if reasoning is None:
        return "closed"
    if continued:
        return "open" if continued.rfind(reasoning.open) > continued.rfind(reasoning.close) else "closed"
    end = prompt.rstrip()
    if end.endswith(reasoning.open):
        return "open"
    return "closed" if end.endswith(reasoning.close) else "maybe"
