"""`headrace serve` over a gpt-oss folder: MXFP4 experts, harmony's channels, tools and schemas over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer

from support.gpt_oss_folder import write_gpt_oss
from support.process import ServeProcess, serving
from support.tiny_folder import write_tokenizer

MARKS = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>"]
TEMPLATE = """\
{%- for m in messages -%}
{%- if m.tool_calls is defined -%}
<|start|>assistant to=functions.{{ m.tool_calls[0].function.name }}<|channel|>commentary json<|message|>
{{- m.tool_calls[0].function.arguments | tojson }}<|call|>
{%- else -%}
<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>
{%- endif -%}
{%- endfor -%}
{%- for t in tools or [] -%}<|start|>developer<|message|>{{ t.function | tojson }}<|end|>{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}"""
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "forecast",
        "parameters": {
            "type": "object",
            "properties": {"days": {"type": "integer", "minimum": 1, "maximum": 99}},
            "required": ["days"],
            "additionalProperties": False,
        },
    },
}
USER: Any = [{"role": "user", "content": "Will it rain?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    folder = tmp_path_factory.mktemp("gpt-oss")
    write_gpt_oss(folder, packed=True, seed=2)
    write_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(MARKS)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    ends = [tokenizer.token_to_id(mark) for mark in ("<|return|>", "<|call|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with serving(f"tiny={folder}", "--device", "cpu") as process:
        yield process


@pytest.fixture(scope="module")
def client(server: ServeProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def test_a_forced_call_and_the_turn_after(client: openai.OpenAI) -> None:
    ask: Any = {"model": "tiny", "messages": USER, "tools": [TOOL], "max_tokens": 200, "seed": 3}
    reply = client.chat.completions.create(**ask, tool_choice="required").choices[0]
    assert reply.finish_reason == "tool_calls"
    call = reply.message.tool_calls[0]
    assert call.function.name == "forecast"
    assert 1 <= json.loads(call.function.arguments)["days"] <= 99
    chunks = list(client.chat.completions.create(**ask, tool_choice="required", stream=True))
    deltas = [delta for c in chunks if c.choices for delta in c.choices[0].delta.tool_calls or []]
    assert "".join(delta.function.arguments or "" for delta in deltas) == call.function.arguments
    after = [*USER, reply.message.model_dump(exclude_none=True)]
    after.append({"role": "tool", "tool_call_id": call.id, "content": "sun"})
    again = client.chat.completions.create(**{**ask, "messages": after}, tool_choice="none").choices[0]
    assert again.message.tool_calls is None


def test_an_answer_by_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"rain": {"type": "boolean"}},
        "required": ["rain"],
        "additionalProperties": False,
    }
    asked: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    reply = client.chat.completions.create(
        model="tiny", messages=USER, response_format=asked, max_tokens=200, seed=1
    )
    assert isinstance(json.loads(reply.choices[0].message.content or "")["rain"], bool)
