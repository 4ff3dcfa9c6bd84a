"""What a request gives to the chat template, and the template never reads, is told."""

from __future__ import annotations

from typing import Any

import pytest

from support.serving import live, says, scripted_model

ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
UNREAD: list[tuple[dict[str, Any], str]] = [
    ({"documents": [{"text": "a"}]}, "documents"),
    ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs.enable_thinking"),
    ({"chat_template_kwargs": {"date_string": "1 May"}}, "chat_template_kwargs.date_string"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
]


@pytest.mark.parametrize(("fields", "named"), UNREAD)
def test_what_the_template_does_not_read_is_told(fields: dict[str, Any], named: str) -> None:
    with live(scripted_model(says("hello"))) as server:
        status, reply, headers = server.post("/v1/chat/completions", ASK | fields)
        assert status == 200
        assert reply["warnings"][0].startswith(f"{named} has no effect")
        assert named in headers["x-headrace-warnings"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"documents": []},
    ],
)
def test_what_changes_nothing_is_not(fields: dict[str, Any]) -> None:
    with live(scripted_model(says("hello"))) as server:
        _, reply, headers = server.post("/v1/chat/completions", ASK | fields)
        assert "warnings" not in reply and "x-headrace-warnings" not in headers
