"""Chat templates: rendered as transformers does, wrong input named, hostile templates stopped."""

from __future__ import annotations

import time
from typing import Any

import pytest

from headrace.errors import HeadraceError, InvalidRequest, Unprocessable
from headrace.text.sandbox import Budget
from headrace.text.template import ChatTemplate

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <b>brief</b> & kind."},
    {"role": "user", "content": "Größe? 你好 🙂"},
    {"role": "assistant", "content": "Ja."},
    {"role": "user", "content": "bye"},
]
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "x": "<é>"}}}]

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
        "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "whitespace": (
        "{{ bos_token }}\n{%- for m in messages %}\n    {% if m.role == 'user' %}\n  U: {{ m.content | trim }}\n"
        "    {% else %}\n  O: {{- m.content }}{{ eos_token }}\n    {% endif %}\n{% endfor %}\n"
    ),
    "tools": (
        "{%- if tools %}{%- for tool in tools %}{{ tool | tojson }}\n{{ tool | tojson(indent=2) }}"
        "{%- endfor %}{%- endif %}"
        "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}"
        "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}{{ ns.last }} {{ documents }}"
    ),
    "control": (
        "{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}{% if m.role == 'system' %}{% continue %}"
        "{% endif %}{% generation %}{{ m.content }}{% endgeneration %}{{ loop.last }}{{ loop.length }}{% endfor %}"
    ),
    "macros": (
        "{% macro show(m, up=false) %}{{ m.content|upper if up else m.content }};{% endmacro %}"
        "{% for m in messages[::-1] %}{{ show(m, up=loop.first) }}{% endfor %}"
        "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}{{ enable_thinking is defined }}"
        "{% set text %}a{{ messages|length }}b{% endset %}{{ text ~ '-' ~ text }}{{ [1, 2]|join(', ') }}"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_equals_transformers(name: str, generate: bool, tools: list[Any] | None) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    kwargs = {"enable_thinking": False}
    specials = {"bos_token": "<s>", "eos_token": "</s>"}
    documents = [{"title": "T", "text": "x"}]
    expected, _ = render_jinja_template(
        [MESSAGES],
        tools=tools,
        documents=documents,
        chat_template=TEMPLATES[name],
        add_generation_prompt=generate,
        **kwargs,
        **specials,
    )
    template = ChatTemplate({"default": TEMPLATES[name]}, specials)
    found = template.render(
        MESSAGES, tools=tools, documents=documents, add_generation_prompt=generate, kwargs=kwargs
    )
    assert found == expected[0]


def test_named_templates_and_the_missing_one() -> None:
    both = ChatTemplate({"default": "plain", "tool_use": "tools"})
    assert both.render(MESSAGES) == "plain"
    assert both.render(MESSAGES, tools=TOOLS) == "tools"
    for missing in ({}, {"rag": "x"}):
        with pytest.raises(Unprocessable, match=r"no chat template.*--chat-template"):
            ChatTemplate(missing).render(MESSAGES)


PARTS = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]


def test_parts_become_what_the_template_takes() -> None:
    assert ChatTemplate({"default": "{{ messages[0].content }}"}).render(PARTS) == "a\nb"
    looping = "{% for part in messages[0]['content'] %}[{{ part.text }}]{% endfor %}"
    assert ChatTemplate({"default": looping}).render(PARTS) == "[a][b]"
    assert ChatTemplate({"default": looping}).render([{"role": "user", "content": "a"}]) == "[a]"
    asking = (
        "{% set content = messages[0].content %}"
        "{% if content is string %}{{ content }}{% else %}" + looping + "{% endif %}"
    )
    assert ChatTemplate({"default": asking}).render([{"role": "user", "content": "a"}]) == "a"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"content": "x"}, "messages[1].role"),
        ({"role": 3, "content": "x"}, "messages[1].role"),
        ({"role": "user", "content": 3}, "messages[1].content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[1].content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content[0].text"),
        ({"role": "assistant", "tool_calls": [3]}, "messages[1].tool_calls[0]"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "messages[1].tool_calls[0].function.arguments",
        ),
    ],
)
def test_wrong_messages_are_named(message: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate({"default": TEMPLATES["chatml"]}).render([MESSAGES[1], message])
    assert caught.value.param == param


def test_tool_calls_null_content_and_reasoning() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, "ü"]}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "hm"}
    source = (
        "{{ messages[0].content }}|{{ messages[0].tool_calls[0].function.arguments.a | tojson }}"
        "|{{ messages[0].reasoning_content }}{{ messages[0].thinking }}"
    )
    assert ChatTemplate({"default": source}).render([message]) == '|[1, "ü"]|hmhm'
    assert call["function"]["arguments"] == '{"a": [1, "ü"]}'  # the caller's own stays


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ messages[9].content }}", "lack.*no element 9"),
        ("{{ messages[0].content + 3 }}", "TypeError"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
    ],
)
def test_what_a_template_raises_is_the_requests_error(source: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        ChatTemplate({"default": source}).render(MESSAGES)
    assert caught.value.param == "messages"


def test_syntax_errors_name_the_line() -> None:
    with pytest.raises(InvalidRequest, match="line 2") as caught:
        ChatTemplate({"default": "x\n{% for %}"})
    assert caught.value.param == "chat_template"


def test_kwargs_may_not_replace_fields() -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate({"default": "x"}).render(MESSAGES, kwargs={"messages": []})
    assert caught.value.param == "chat_template_kwargs"


def test_continuing_the_final_message() -> None:
    template = ChatTemplate({"default": TEMPLATES["chatml"]})
    text = template.render(MESSAGES[:3], add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\nJa.")
    with pytest.raises(InvalidRequest, match="leaves out the last message"):
        ChatTemplate({"default": "{{ messages[0].content }}"}).render(
            MESSAGES, add_generation_prompt=False, continue_final_message=True
        )
    with pytest.raises(InvalidRequest, match="one either continues or begins"):
        template.render(MESSAGES, continue_final_message=True)


GROW = (
    "{% set ns = namespace(s='aaaaaaaa') %}"
    "{% for i in range(90) %}{% set ns.s = EXPR %}{% endfor %}{{ ns.s|length }}"
)
HOSTILE = {
    "nested loops": "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "large range": "{% for i in range(99999999) %}{% endfor %}",
    "repeat": "{{ messages[0].content * 999999999999 }}",
    "repeat at compile time": "{{ 'a' * 999999999999 }}",
    "doubling ~": GROW.replace("EXPR", "ns.s ~ ns.s"),
    "doubling +": GROW.replace("EXPR", "ns.s + ns.s"),
    "replace method": GROW.replace("EXPR", "ns.s.replace('a', 'aaaaaaaaaaaaaaaa')"),
    "replace filter": GROW.replace("EXPR", "ns.s|replace('a', 'aaaaaaaaaaaaaaaa')"),
    "join": GROW.replace("EXPR", "ns.s.join(['a'] * 999)"),
    "percent width": "{{ '%0999999999d' % messages|length }}",
    "percent star": "{{ '%*d' % (999999999, 1) }}",
    "brace width": "{{ '{:999999999}'.format(1) }}",
    "center": "{{ messages[0].content|center(999999999) }}",
    "ljust": "{{ messages[0].content.ljust(999999999) }}",
    "indent": "{{ messages|tojson(indent=99999999) }}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "power": "{{ (messages|length + 9) ** (10 ** 8) }}",
    "power at compile time": "{{ 9**9**9**9 }}",
    "long output": "{% for i in range(9999) %}" + "x" * 5000 + "{% endfor %}",
    "hidden output": "{% set s %}{% for i in range(9999) %}"
    + "x" * 30000
    + "{% endfor %}{% endset %}{{ s|length }}",
    "nested lists": "{% set a = [messages] * 99999 %}{% set b = [a] * 99999 %}{{ b|string|length }}",
    "nested lists as json": "{% set a = [messages] * 99999 %}{% set b = [a] * 99999 %}{{ b|tojson|length }}",
    "sorting": "{% for i in range(9999) %}{% set x = range(9999)|list|sort %}{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_stopped(name: str) -> None:
    began = time.process_time()
    with pytest.raises(HeadraceError):
        ChatTemplate({"default": HOSTILE[name]}, budget=Budget(seconds=0.5, characters=1 << 20)).render(
            MESSAGES
        )
    assert time.process_time() - began < 20  # without the budget these take hours or all memory


def test_only_time_at_work_counts() -> None:
    """Not that of a thread which others keep from the processor."""
    messages = [{"role": "user", "content": "a"}]
    template = ChatTemplate(
        {"default": "{% for m in messages * 20 %}{{ m.content }}{% endfor %}"}, budget=Budget(seconds=0.3)
    )

    class Slow(str):
        __slots__ = ()

        def __str__(self) -> str:
            time.sleep(0.05)
            return "b"

    assert template.render(messages) == "a" * 20
    assert template.render([{"role": "user", "content": Slow("a")}]) == "b" * 20


def test_a_long_honest_chat_is_within_the_budget() -> None:
    chat = [{"role": "user" if i % 2 == 0 else "assistant", "content": "word " * 50} for i in range(4000)]
    text = ChatTemplate({"default": TEMPLATES["chatml"]}).render(chat)
    assert len(text) > 1_000_000
