"""The encode loop in its own process, over ZMQ, with the packaged real model."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.config.spec import EngineSpec
from headrace.engines.process import start
from headrace.errors import Unprocessable
from headrace.text.tokenizer import Tokenizer
from headrace.types import EncodeParams, EncodeTask, Request

pytestmark = pytest.mark.models


def test_vectors_errors_and_cancellation_over_zmq(minilm_path: Path) -> None:
    asyncio.run(_vectors_errors_and_cancellation(minilm_path))


async def _vectors_errors_and_cancellation(path: Path) -> None:
    client = await start(EngineSpec(model="minilm", path=path, num_threads=1))
    try:
        assert (client.ready.engine, client.ready.max_model_len) == ("bert", 256)
        tokenizer = Tokenizer.from_path(path)
        texts = ["eating food", "having a meal", "the stock market"] * 20
        requests = [
            Request(id=str(i), token_ids=tuple(tokenizer.encode(text)), encode=EncodeParams())
            for i, text in enumerate(texts)
        ]
        outputs = await asyncio.gather(*(client.encode(request) for request in requests))
        vectors = np.stack([np.frombuffer(output.data, "<f4") for output in outputs])
        assert vectors.shape == (60, 384)
        np.testing.assert_allclose(vectors[:3], vectors[-3:], atol=1e-6)
        assert vectors[0] @ vectors[1] > 0.6 > 0.2 > vectors[0] @ vectors[2]
        sparse = Request(id="s", token_ids=(101, 102), encode=EncodeParams(task=EncodeTask.SPARSE))
        with pytest.raises(Unprocessable, match="cannot sparse"):
            await client.encode(sparse)
        async with asyncio.timeout(100):
            for turn in itertools.count():  # again where this thread stood still, and the core did not
                await _cancel_all_but_one(client, requests[0].token_ids, turn)
                for _ in range(60):  # counters travel with the next message, at the latest with a heartbeat
                    if client.stats.aborted_tokens > 0:
                        return
                    await asyncio.sleep(0.05)
    finally:
        await client.close()


async def _cancel_all_but_one(client: Any, ids: tuple[int, ...], turn: int) -> None:
    """In the middle of the work, where the core stands still until they are cancelled."""
    long = ids + ids[1:-1] * 100
    tasks = [
        asyncio.ensure_future(
            client.encode(Request(id=f"c{turn}-{i}", token_ids=long[:250], encode=EncodeParams()))
        )
        for i in range(100)
    ]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    os.kill(client._process.pid, signal.SIGSTOP)
    for task in tasks[:-1]:
        task.cancel()
    await asyncio.sleep(0)
    os.kill(client._process.pid, signal.SIGCONT)
    assert (await tasks[-1]).shape == (384,)
