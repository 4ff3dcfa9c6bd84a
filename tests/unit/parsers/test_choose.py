"""Which format is found, and the names by which one can be asked for."""

from __future__ import annotations

import pytest

from headrace.errors import ConfigError
from headrace.serving.parsers.choose import choose, thinking_of
from headrace.serving.parsers.formats import build, reasoning_name, tool_name

# What the templates of these checkpoints hold, as far as it tells them apart.
TEMPLATES = {
    ("Qwen2ForCausalLM", '{% if tools %}<tool_call>\\n{"name": <function-name>'): ("hermes", None),
    ("Qwen3ForCausalLM", "{{ tools }}<tool_call> <think>\\n\\n</think>"): ("hermes", "think"),
    ("Qwen3MoeForCausalLM", "<tool_call>\\n<function=example>\\n<parameter=one>"): ("qwen3_coder", None),
    ("Glm4MoeForCausalLM", "<tool_call>{{ name }}<arg_key> <think></think>"): ("glm4_moe", "think"),
    ("LlamaForCausalLM", '<|python_tag|> {"name": function name, "parameters": '): ("llama3_json", None),
    ("Llama4ForConditionalGeneration", "<|python_start|> [func_name1(a=b)]"): ("pythonic", None),
    ("MistralForCausalLM", "[AVAILABLE_TOOLS] [TOOL_CALLS] [{"): ("mistral", None),
    ("Mistral3ForConditionalGeneration", "[TOOL_CALLS] [ARGS] [THINK]"): ("mistral_args", "mistral"),
    ("DeepseekV3ForCausalLM", "<｜tool▁call▁begin｜> ```json {% set c = c.split('</think>')[-1] %}"): (
        "deepseek_v3",
        "deepseek_r1",
    ),
    ("DeepseekV3ForCausalLM", "<｜tool▁call▁begin｜> <think> </think>"): ("deepseek_v31", "deepseek_v3"),
    ("DeepseekV3ForCausalLM", "<|tool_calls_section_begin|>"): ("kimi_k2", None),
    ("GptOssForCausalLM", "<|channel|>analysis<|message|>"): ("harmony", "harmony"),
    ("Phi3ForCausalLM", "<|tool|>{{ tools }}<|/tool|>"): ("phi4", None),
    ("GraniteForCausalLM", "<|tool_call|> available_tools"): ("granite", None),
    ("Gemma3ForCausalLM", "<start_function_call>call:"): ("gemma", None),
    ("LlamaForCausalLM", "<|im_start|>"): ("hermes", None),
}


@pytest.mark.parametrize(("given", "expected"), TEMPLATES.items(), ids=lambda v: str(v)[:40])
def test_found_by_template_and_architecture(given: tuple[str, str], expected: tuple[str, str | None]) -> None:
    architecture, template = given
    assert choose(template, architecture, None, None) == build(*expected)


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        *(
            ("deepseekv3", "deepseek_v3"),
            ("pythonic", "pythonic"),
            ("qwen25", "hermes"),
            ("harmony", "harmony"),
        ),
        *(
            ("llama4_pythonic", "pythonic"),
            ("glm45", "glm4_moe"),
            ("openai", "harmony"),
            ("phi4_mini_json", "phi4"),
        ),
    ],
)
def test_names_of_other_servers(name: str, canonical: str) -> None:
    assert tool_name(name) == canonical
    assert choose("", "", name, "none") == build(canonical, None)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="hermes"):
        tool_name("hermess")
    with pytest.raises(ConfigError, match="deepseek_r1"):
        reasoning_name("deepseek_r2")
    assert choose("<think></think>", "", "none", None) == build(None, "think")


def test_how_a_prompt_leaves_the_thinking() -> None:
    format = build("hermes", "think")
    assert thinking_of(format, "<|assistant|><think>\n", None) == "open"
    assert thinking_of(format, "<|assistant|><think>\n\n</think>\n\n", None) == "closed"
    assert thinking_of(format, "is <think> a tag? <|assistant|>", None) == "maybe"
    assert thinking_of(format, "...", "<think>so") == "open"
    assert thinking_of(format, "...", "<think>so</think> yes") == "closed"
    assert thinking_of(build("hermes", None), "<think>", None) == "closed"
