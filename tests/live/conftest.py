"""A real server over the packaged model, for tests that only ask it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from headrace.config.spec import EngineSpec
from headrace.serving.state import Model, ServerOptions
from support.serving import LiveServer

if TYPE_CHECKING:
    from support.one_pass import Served


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


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    from support.one_pass import serve_one_pass

    yield from serve_one_pass(tmp_path_factory)
