"""A real server over the packaged model, for tests that only ask it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from headrace.config.spec import EngineSpec
from headrace.serving.state import Model, ServerOptions
from support.serving import LiveServer


@pytest.fixture(scope="session")
def server() -> Iterator[LiveServer]:
    spec = EngineSpec(
        model="smollm2-135m",
        served_names=("m",),
        max_model_len=1024,
        max_num_seqs=8,
        kv_cache_bytes=256 << 20,
        num_threads=1,
    )
    server = LiveServer([Model(spec)], ServerOptions(port=0))
    try:
        asyncio.run_coroutine_threadsafe(server.server.load(), server.loop).result(120)
        yield server
    finally:
        server.close()
