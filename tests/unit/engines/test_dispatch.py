"""What the client of a core makes of its messages."""

from __future__ import annotations

import pytest

from headrace.config.spec import EngineSpec
from headrace.engines.dispatch import DispatchClient
from headrace.messages import CoreStats, Heartbeat, Ready


def test_beats_without_steps_are_a_stall_while_there_is_work(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("headrace.engines.dispatch.time.monotonic", lambda: now)
    client = DispatchClient(
        EngineSpec(model="m"), Ready("dense", max_model_len=8, max_num_seqs=1, vocab_size=9)
    )

    def beat(seconds: int, **stats: int) -> str:
        nonlocal now
        for _ in range(seconds):
            now += 1.0
            client._receive(Heartbeat(CoreStats(**stats)))
        return client.health().status

    assert beat(200, steps=5) == "ok"  # nothing to do
    assert beat(25, steps=5, num_waiting=1) == "ok"
    assert beat(25, steps=5, num_waiting=1) == "stalled"
    assert "no step" in client.health().reason
    assert beat(1, steps=6, num_running=1) == "ok"
    assert beat(200, steps=6) == "ok"
    now += 25.0
    assert client.health().status == "stalled"  # silence
