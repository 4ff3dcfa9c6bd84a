"""Our bulk client against our server."""

from __future__ import annotations

import time

import pytest

from headrace.client import HTTPError, PerformanceClient, RequestProcessingPreference
from support.serving import live, says, scripted_model


@pytest.mark.parametrize("stream", [False, True])
def test_chat_and_completions(stream: bool) -> None:
    with live() as server:
        client = PerformanceClient(server.url, "k")
        answers = client.chat([str(i) for i in range(50)], "m", stream=stream, max_tokens=32)
        assert [answer.text for answer in answers] == ["Hello!"] * 50
        assert all(answer.usage["completion_tokens"] == 7 for answer in answers)
        assert all((answer.first_token_s is not None) == stream for answer in answers)
        texts = client.completions(["a", [1, 2, 3]], "m", stream=stream)
        assert [answer.text for answer in texts] == ["Hello!"] * 2
        with pytest.raises(HTTPError) as caught:
            client.chat(["a"], "absent", stream=stream)
        assert caught.value.status == 404
        assert caught.value.response.json()["error"]["code"] == "model_not_found"


def test_a_full_server_is_waited_for() -> None:
    """Room for 4 sequences and no queue: everything above gets 429, and all are answered in the end."""
    with live(scripted_model(says("Hi", delay=0.002), max_num_seqs=4, max_queue=0)) as server:
        client = PerformanceClient(server.url, "k")
        wanted = RequestProcessingPreference(max_concurrent_requests=32, initial_backoff_ms=50)
        answers = client.chat([str(i) for i in range(60)], "m", wanted)
        assert [answer.text for answer in answers] == ["Hi"] * 60


def test_leaving_a_stream_frees_the_engine() -> None:
    with live(scripted_model(says("x", delay=0.02, eos=False))) as server:
        client = PerformanceClient(server.url, "k")
        with pytest.raises(OSError):
            client.chat(
                ["a"] * 4, "m", RequestProcessingPreference(timeout_s=0.3, max_retries=0), stream=True
            )
        deadline = time.monotonic() + 60
        while server.state.running and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not server.state.running
