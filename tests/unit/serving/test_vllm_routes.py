"""Routes in vLLM's shape: tokens of a prompt or a conversation, and back; version and ping."""

from __future__ import annotations

import pytest

from headrace import __version__
from support.serving import BOS, live, scripted_model


def test_tokens_of_a_prompt_and_back() -> None:
    with live() as server:
        status, reply, _ = server.post("/tokenize", {"model": "m", "prompt": "hé", "return_token_strs": True})
        assert status == 200
        assert reply["tokens"] == [BOS, *"hé".encode()] and reply["count"] == 4
        assert reply["max_model_len"] == 4096 and reply["token_strs"][1] == "h"
        _, bare, _ = server.post("/tokenize", {"model": "m", "prompt": "hé", "add_special_tokens": False})
        assert bare["tokens"] == list("hé".encode()) and bare["token_strs"] is None
        _, text, _ = server.post("/detokenize", {"model": "m", "tokens": reply["tokens"]})
        assert text == {"prompt": "<bos>hé"}


def test_tokens_of_a_conversation_are_those_of_the_chat_route() -> None:
    ask = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    with live() as server:
        _, reply, _ = server.post("/tokenize", ask)
        assert bytes(reply["tokens"]) == b"user: hi\nassistant: "
        _, answer, _ = server.post("/v1/chat/completions", ask)
        assert answer["usage"]["prompt_tokens"] == reply["count"]
        _, without, _ = server.post("/tokenize", ask | {"add_generation_prompt": False})
        assert bytes(without["tokens"]) == b"user: hi"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"model": "m", "prompt": 5}, "prompt"),
        ("/tokenize", {"model": "m", "messages": "x"}, "messages"),
        ("/tokenize", {"model": "m", "prompt": "x", "foo": 1}, "foo"),
        ("/detokenize", {"model": "m", "tokens": [512]}, "tokens"),
        ("/detokenize", {"model": "m", "tokens": [-1]}, "tokens"),
        ("/detokenize", {"model": "m", "tokens": ["a"]}, "tokens[0]"),
        ("/score", {"model": "m", "text_1": ["a", "b"], "text_2": ["a"]}, "text_1"),
    ],
)
def test_wrong_bodies(path: str, body: dict[str, object], param: str) -> None:
    with live() as server:
        status, reply, _ = server.post(path, body)
        assert (status, reply["error"]["param"]) == (400, param)


def test_probes() -> None:
    with live(scripted_model(), api_keys=("secret",)) as server:
        assert server.request("GET", "/version")[1] == {"version": __version__}
        assert server.request("GET", "/ping")[0] == server.request("POST", "/ping")[0] == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/messages"])
def test_an_embedder_says_that_it_writes_no_text(path: str) -> None:
    ask = {"model": "m", "max_tokens": 4} | (
        {"prompt": "hi"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "hi"}]}
    )
    with live(scripted_model(kind="bert")) as server:
        status, reply, _ = server.post(path, ask)
        assert status == 422 and "generates no text" in reply["error"]["message"]
