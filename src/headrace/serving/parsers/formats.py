"""The declarations, and the names by which they can be asked for.

Sources are the chat templates of the checkpoints named; names of other servers are in ALIASES.
"""

from __future__ import annotations

from headrace.errors import ConfigError, nearest
from headrace.serving.parsers.grammar import (
    Arguments,
    CallObject,
    Channels,
    Format,
    GemmaArguments,
    Lit,
    Name,
    Params,
    PythonCall,
    Reasoning,
    Section,
    ToolFormat,
)

__all__ = ["HARMONY", "REASONING", "TOOLS", "build", "reasoning_name", "tool_name"]

_JSON = (CallObject(),)
_DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_DEEPSEEK_CALL = ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>")

TOOLS: dict[str, ToolFormat] = {
    one.name: one
    for one in (
        # Qwen2.5, Qwen3, Hermes 2 and 3, Granite 4
        ToolFormat("hermes", Section(("<tool_call>",), _JSON, "</tool_call>", many=True)),
        # Qwen3-Coder
        ToolFormat(
            "qwen3_coder",
            Section(
                ("<tool_call>",),
                (
                    Lit("<function="),
                    Name((">",), after="\n"),
                    Params("<parameter=", ">", "</parameter>", pad="\n"),
                    Lit("</function>"),
                ),
                "</tool_call>",
                many=True,
            ),
        ),
        # Llama 3.1, 3.2 and 3.3
        ToolFormat(
            "llama3_json",
            Section(
                ("<|python_tag|>",),
                (CallObject(arguments=("parameters", "arguments")),),
                separator=";",
                bare=True,
            ),
        ),
        # Llama 3.2 and 4
        ToolFormat(
            "pythonic",
            Section(("<|python_start|>",), (PythonCall(),), "<|python_end|>", True, listed=True, bare=True),
        ),
        # Mistral up to Nemo and Small 2501: a list of objects
        ToolFormat("mistral", Section(("[TOOL_CALLS]",), _JSON, listed=True), "short"),
        # Mistral from Small 3.1 on; tokenizer 11 puts the call's id between name and arguments, 13 does not
        ToolFormat(
            "mistral_args",
            Section(("[TOOL_CALLS]",), (Name(("[ARGS]",), keep=("{",), id_mark="[CALL_ID]"), Arguments())),
            "short",
        ),
        # DeepSeek V3 and R1
        ToolFormat(
            "deepseek_v3",
            Section(
                (_DEEPSEEK[0],),
                (
                    Lit(_DEEPSEEK_CALL[0]),
                    Lit("function"),
                    Lit(_DEEPSEEK_CALL[1]),
                    Name(("```json",), before="\n", after="\n"),
                    Arguments(),
                    Lit("```", before="\n"),
                    Lit(_DEEPSEEK_CALL[2]),
                ),
                _DEEPSEEK[1],
                many=True,
            ),
        ),
        # DeepSeek V3.1
        ToolFormat(
            "deepseek_v31",
            Section(
                (_DEEPSEEK[0],),
                (Lit(_DEEPSEEK_CALL[0]), Name((_DEEPSEEK_CALL[1],)), Arguments(), Lit(_DEEPSEEK_CALL[2])),
                _DEEPSEEK[1],
                many=True,
            ),
        ),
        # GLM 4.5, 4.6
        ToolFormat(
            "glm4_moe",
            Section(
                ("<tool_call>",),
                (
                    Name((), keep=("<arg_key>", "</tool_call>"), after="\n"),
                    Params("<arg_key>", "</arg_key>", "</arg_value>", "<arg_value>"),
                ),
                "</tool_call>",
            ),
        ),
        # Kimi-K2
        ToolFormat(
            "kimi_k2",
            Section(
                ("<|tool_calls_section_begin|>",),
                (
                    Lit("<|tool_call_begin|>"),
                    Name(("<|tool_call_argument_begin|>",), numbered=True),
                    Arguments(),
                    Lit("<|tool_call_end|>"),
                ),
                "<|tool_calls_section_end|>",
                many=True,
            ),
        ),
        # Phi-4-mini
        ToolFormat(
            "phi4", Section(("<|tool_call|>", "functools"), _JSON, "<|/tool_call|>", True, listed=True)
        ),
        # Granite 3
        ToolFormat("granite", Section(("<|tool_call|>", "<tool_call>"), _JSON, listed=True)),
        # FunctionGemma
        ToolFormat(
            "gemma",
            Section(
                ("<start_function_call>",),
                (Lit("call:"), Name((), keep=("{",)), GemmaArguments("<escape>")),
                "<end_function_call>",
            ),
        ),
        # Gemma 4
        ToolFormat(
            "gemma4",
            Section(
                ("<|tool_call>",),
                (Lit("call:"), Name((), keep=("{",)), GemmaArguments('<|"|>')),
                "<tool_call|>",
            ),
        ),
    )
}

REASONING: dict[str, Reasoning] = {
    one.name: one
    for one in (
        Reasoning("think", "<think>", "</think>"),
        Reasoning("deepseek_r1", "<think>", "</think>", implicit=True, ended_by_calls=True),
        Reasoning("deepseek_v3", "<think>", "</think>", ended_by_calls=True),
        Reasoning("kimi_k2", "<think>", "</think>", ended_by_calls=True),
        Reasoning("mistral", "[THINK]", "[/THINK]", ended_by_calls=True),
        Reasoning("granite", "<think>", "</think>"),
        Reasoning("gemma4", "<|channel>thought", "<channel|>"),
    )
}

HARMONY = Format(channels=Channels())

_TOOL_ALIASES = {
    "qwen": "hermes",
    "qwen25": "hermes",
    "qwen3": "hermes",
    "qwen3_xml": "qwen3_coder",
    "granite4": "hermes",
    "llama3": "llama3_json",
    "llama4_json": "llama3_json",
    "llama4_pythonic": "pythonic",
    "llama3_pythonic": "pythonic",
    "deepseekv3": "deepseek_v3",
    "deepseekv31": "deepseek_v31",
    "glm45": "glm4_moe",
    "glm": "glm4_moe",
    "glm47": "glm4_moe",
    "mistral_v11": "mistral_args",
    "granite3": "granite",
    "qwen3_coder_xml": "qwen3_coder",
    "deepseek_r1": "deepseek_v3",
    "deepseek-v3": "deepseek_v3",
    "deepseek-v31": "deepseek_v31",
    "kimi-k2": "kimi_k2",
    "kimi": "kimi_k2",
    "phi4_mini_json": "phi4",
    "phi4_mini": "phi4",
    "functiongemma": "gemma",
    "openai": "harmony",
    "gpt-oss": "harmony",
    "gptoss": "harmony",
}
_REASONING_ALIASES = {
    "qwen3": "think",
    "glm45": "think",
    "hermes": "think",
    "deepseek-r1": "deepseek_r1",
    "deepseek-v3": "deepseek_v3",
    "kimi": "kimi_k2",
    "qwen3-thinking": "deepseek_r1",
    "deepseek-v31": "deepseek_v3",
    "deepseek_v31": "deepseek_v3",
    "deepseekv3": "deepseek_v3",
    "deepseekv31": "deepseek_v3",
    "glm47": "think",
    "openai": "harmony",
    "openai_gptoss": "harmony",
    "gpt-oss": "harmony",
    "gptoss": "harmony",
}


def tool_name(given: str) -> str:
    """Canonical name of a tool format; raises ConfigError for one that is not known."""
    return _known(given, (*TOOLS, "harmony"), _TOOL_ALIASES, "tool_call_parser")


def reasoning_name(given: str) -> str:
    """Canonical name of a reasoning format; raises ConfigError for one that is not known."""
    return _known(given, (*REASONING, "harmony"), _REASONING_ALIASES, "reasoning_parser")


def _known(given: str, names: tuple[str, ...], aliases: dict[str, str], field: str) -> str:
    name = aliases.get(given, given)
    if name not in names:
        known = sorted({*names, *aliases})
        raise ConfigError(
            f"{field} {given!r} is not known{nearest(given, known)}; there are {', '.join(known)}",
            param=field,
        )
    return name


def build(tools: str | None, reasoning: str | None) -> Format:
    """A Format from canonical names."""
    if "harmony" in (tools, reasoning):
        return HARMONY
    return Format(TOOLS[tools] if tools else None, REASONING[reasoning] if reasoning else None)
