"""Sample turns of every format, with what is in them: (thoughts, content, [(name, arguments)])."""

from __future__ import annotations

from typing import Any, NamedTuple

TOOLS: dict[str, Any] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "exact": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "where": {"type": "object"},
        },
        "required": ["city"],
    },
    "now": {"type": "object", "properties": {}},
}
BOTH = {"city": 'Köln "am" Rhein 🌧', "days": 3}


class Turn(NamedTuple):
    """``tools`` and ``reasoning`` name formats; ``thinking`` is how the prompt left it."""

    tools: str | None
    reasoning: str | None
    thinking: str
    text: str
    thoughts: str
    content: str
    calls: list[tuple[str, Any]]


def _call(tools: str, text: str, content: str, calls: list[tuple[str, Any]], **more: Any) -> Turn:
    given = {"reasoning": None, "thinking": "maybe", "thoughts": ""} | more
    return Turn(tools, given["reasoning"], given["thinking"], text, given["thoughts"], content, calls)


W = "get_weather"
J = '{"city": "Köln \\"am\\" Rhein 🌧", "days": 3}'
HERMES = f'<tool_call>\n{{"name": "{W}", "arguments": {J}}}\n</tool_call>'
HERMES_NOW = '<tool_call>{"arguments": {}, "name": "now"}</tool_call>'
CODER = (
    '<tool_call>\n<function=get_weather>\n<parameter=city>\nKöln "am" Rhein 🌧\n</parameter>\n'
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
)
CODER_NOW = "<tool_call>\n<function=now>\n</function>\n</tool_call>"
GLM = (
    '<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Köln "am" Rhein 🌧</arg_value>\n'
    "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"
)
DS3 = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n" + J + "\n```"
    "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜>"
    "<｜tool▁calls▁end｜>"
)
DS31 = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>" + J + "<｜tool▁call▁end｜>"
    "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
KIMI = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    + J
    + "<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
    "<|tool_calls_section_end|>"
)
GEMMA = (
    '<start_function_call>call:get_weather{city:<escape>Köln "am" Rhein 🌧<escape>,days:3}<end_function_call>'
)
GEMMA4 = '<|tool_call>call:get_weather{city:<|"|>Köln "am" Rhein 🌧<|"|>,days:3}<tool_call|>'
PY = "[get_weather(city='Köln \"am\" Rhein 🌧', days=3), now()]"
LIST = f'[{{"name": "{W}", "arguments": {J}}}, {{"name": "now", "arguments": {{}}}}]'
HARMONY = (
    "<|channel|>analysis<|message|>Hm <b>?<|end|><|start|>assistant<|channel|>commentary<|message|>Looking.<|end|>"
    "<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
    + J
    + "<|call|>"
)
ONE, TWO = [(W, BOTH)], [(W, BOTH), ("now", {})]

TURNS: list[Turn] = [
    _call("hermes", HERMES, "", ONE),
    _call("hermes", f"Sure:\n\n{HERMES}\n{HERMES_NOW}\nDone < all.\n", "Sure:Done < all.\n", TWO),
    _call("hermes", f"<tool_call>{{}}</tool_call> x {HERMES}", "<tool_call>{}</tool_call> x", ONE),
    _call("hermes", "<tool_call>\nnot json</tool_call>", "<tool_call>\nnot json</tool_call>", []),
    _call(
        "hermes",
        '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>',
        "",
        [("now", {"a": 1})],
    ),
    _call("hermes", "a <tool <tool_call", "a <tool <tool_call", []),
    _call("hermes", '<tool_call>{"name": "now"', '<tool_call>{"name": "now"', []),
    _call("hermes", "  just text\n\n", "  just text\n\n", []),
    _call(
        "hermes",
        f"<think>\nLet me <tool_call> see\n</think>\n\nHere:\n{HERMES}",
        "Here:",
        ONE,
        reasoning="think",
        thoughts="Let me <tool_call> see",
    ),
    _call("hermes", f"ok\n</think>\n\n{HERMES}", "", ONE, reasoning="think", thinking="open", thoughts="ok"),
    _call("hermes", "a </think> b", "a </think> b", [], reasoning="think", thinking="closed"),
    _call("qwen3_coder", f"I look.\n{CODER}\n{CODER_NOW}", "I look.", TWO),
    _call(
        "qwen3_coder",
        "<tool_call><function=get_weather><parameter=city>\na\n\n</b>\n</parameter><parameter=exact>True</parameter>"
        '<parameter=tags>["x"]</parameter><parameter=where>{"a": [1]}</parameter></function></tool_call>',
        "",
        [(W, {"city": "a\n\n</b>", "exact": True, "tags": ["x"], "where": {"a": [1]}})],
    ),
    _call("glm4_moe", f"\n{GLM}\n<tool_call>now\n</tool_call>", "", TWO),
    _call("glm4_moe", f"<think>hm</think>\nyes {GLM}", "yes", ONE, reasoning="think", thoughts="hm"),
    _call(
        "llama3_json",
        f'<|python_tag|>{{"name": "{W}", "parameters": {J}}}; {{"name": "now", "parameters": {{}}}}',
        "",
        TWO,
    ),
    _call("llama3_json", f' {{"type": "function", "name": "{W}", "parameters": {J}}}', "", ONE),
    _call("llama3_json", '{"name": "bob", "parameters": {}}', '{"name": "bob", "parameters": {}}', []),
    _call("llama3_json", '{"answer": [1, 2]} yes', '{"answer": [1, 2]} yes', []),
    _call("pythonic", PY, "", TWO),
    _call("pythonic", f"<|python_start|>{PY}<|python_end|>bye", "bye", TWO),
    _call("pythonic", "[1, 2] and [now()]", "[1, 2] and [now()]", []),
    _call("pythonic", "[now(1)]", "[now(1)]", []),
    _call("mistral", f"[TOOL_CALLS] {LIST}", "", TWO),
    _call("mistral", "a [TOOL] [TOOL_CALLS] [1]", "a [TOOL] [TOOL_CALLS] [1]", []),
    _call("mistral_args", f"Hi [TOOL_CALLS]{W}[ARGS]{J}[TOOL_CALLS]now{{}}", "Hi", TWO),
    _call("mistral_args", f"[TOOL_CALLS]{W}[ARGS]{J}", "", ONE),
    _call("deepseek_v3", f"So:\n{DS3}", "So:", TWO),
    _call("deepseek_v3", f"hm\n{DS3}", "", TWO, reasoning="deepseek_r1", thoughts="hm"),
    _call("deepseek_v31", DS31, "", TWO),
    _call(
        "deepseek_v31", f"x</think>{DS31}", "", TWO, reasoning="deepseek_v3", thinking="open", thoughts="x"
    ),
    _call("kimi_k2", f"Wait. {KIMI}", "Wait.", TWO),
    _call("phi4", f"<|tool_call|>{LIST}<|/tool_call|>", "", TWO),
    _call("phi4", f"import functools as f; functools{LIST}", "import functools as f;", TWO),
    _call("granite", f"<|tool_call|>{LIST}", "", TWO),
    _call("granite", f'<tool_call>{{"name": "{W}", "arguments": {J}}}', "", ONE),
    _call("gemma", f"{GEMMA}<start_function_call>call:now{{}}<end_function_call>", "", TWO),
    _call("gemma4", f"a {GEMMA4} b", "ab", ONE),
    _call("gemma", "<start_function_call>call:now(x)", "<start_function_call>call:now(x)", []),
    _call("harmony", HARMONY, "Looking.", ONE, reasoning="harmony", thoughts="Hm <b>?"),
    _call("harmony", "<|channel|>final<|message|>a<|b<|return|>", "a<|b", [], reasoning="harmony"),
    _call("harmony", "plain < text", "plain < text", [], reasoning="harmony"),
]
