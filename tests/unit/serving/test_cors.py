"""Browsers on other origins: preflights without a key, marks on every answer, and nothing without the option."""

from __future__ import annotations

import pytest

from headrace.errors import ConfigError
from headrace.serving.cors import check_origins
from support.serving import live, scripted_model

ORIGIN = "https://app.example.com"
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
ASK = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}
KEY = {"Authorization": "Bearer k"}


def test_a_page_of_an_allowed_origin() -> None:
    with live(cors_origins=(ORIGIN,), api_keys=("k",)) as server:
        status, _, headers = server.request("OPTIONS", "/v1/chat/completions", None, ASK)
        assert status == 204
        assert headers["access-control-allow-origin"] == ORIGIN
        assert headers["access-control-allow-headers"] == "authorization,content-type"
        assert "POST" in headers["access-control-allow-methods"]
        for body, expected in ((CHAT, 200), ({**CHAT, "stream": True}, 200), ({"model": 5}, 400)):
            status, _, headers = server.post("/v1/chat/completions", body, Origin=ORIGIN, **KEY)
            assert (status, headers["access-control-allow-origin"]) == (expected, ORIGIN)
            assert "x-request-id" in headers["access-control-expose-headers"].lower()
        status, _, headers = server.post("/v1/chat/completions", CHAT, Origin=ORIGIN)
        assert (status, headers["access-control-allow-origin"]) == (
            401,
            ORIGIN,
        )  # so that the page learns why
        status, _, headers = server.request("GET", "/nowhere", None, {"Origin": ORIGIN, **KEY})
        assert (status, headers["access-control-allow-origin"]) == (404, ORIGIN)


@pytest.mark.parametrize(
    "origin", ["https://evil.example.com", "null", "https://app.example.com.evil.com", ""]
)
def test_other_pages_get_no_leave(origin: str) -> None:
    with live(scripted_model(), cors_origins=(ORIGIN,)) as server:
        status, _, headers = server.request("OPTIONS", "/v1/models", None, {**ASK, "Origin": origin})
        assert status == 405
        assert "access-control-allow-origin" not in headers
        _, _, headers = server.request("GET", "/v1/models", None, {"Origin": origin})
        assert "access-control-allow-origin" not in headers
        assert headers["vary"] == "Origin"  # a cache must not hand this answer to the allowed page


def test_every_page_or_none() -> None:
    with live(cors_origins=("*",)) as server:
        _, _, headers = server.request("OPTIONS", "/v1/models", None, {**ASK, "Origin": "http://any"})
        assert headers["access-control-allow-origin"] == "*"
        _, _, headers = server.request("GET", "/v1/models", None, {})
        assert "access-control-allow-origin" not in headers
    with live() as server:
        status, _, headers = server.request("OPTIONS", "/v1/models", None, ASK)
        assert status == 405
        assert not [name for name in headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "origin", ["", "app.example.com", "https://", "https://a/b", "https://a b", "a://b/"]
)
def test_what_is_no_origin(origin: str) -> None:
    check_origins(("*", "http://localhost:3000", ORIGIN))
    with pytest.raises(ConfigError, match="--cors-allow-origin"):
        check_origins((origin,))
