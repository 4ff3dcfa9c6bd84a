"""A real core in a process of its own, over ZMQ, and the same core in a thread."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from headrace.config.spec import EngineSpec
from headrace.engines.core_process import ZmqTransport
from headrace.engines.dispatch import DispatchClient
from headrace.engines.process import ProcessClient, start, start_in_process
from headrace.errors import EngineDead, InvalidRequest, MissingFile, NotReady, UnknownArchitecture
from headrace.messages import Shutdown
from headrace.types import FinishReason, Output, Request, SamplingParams
from support.tiny_folder import write_llama

STARTS: dict[str, Callable[[EngineSpec], Awaitable[DispatchClient]]] = {
    "process": start,
    "thread": start_in_process,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> EngineSpec:
    folder = write_llama(tmp_path_factory.mktemp("tiny"))
    return EngineSpec(model=str(folder), path=folder, num_threads=1, kv_cache_bytes=4 << 20, max_num_seqs=8)


def request(name: str, **sampling: object) -> Request:
    params = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True, **sampling}
    return Request(id=name, token_ids=tuple(range(3, 40)), sampling=SamplingParams(**params))  # type: ignore[arg-type]


async def collect(client: DispatchClient, r: Request) -> list[Output]:
    return [output async for output in client.generate(r)]


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("how", STARTS)
def test_generate_cancel_refuse_and_drain(how: str, tiny: EngineSpec) -> None:
    async def scenario() -> None:
        client = await STARTS[how](tiny)
        assert client.ready.vocab_size == 300
        assert client.health().status == "ok"
        together = await asyncio.gather(*(collect(client, request(f"g{i}")) for i in range(12)))
        assert len({tuple(tokens(outputs)) for outputs in together}) == 1
        assert len(tokens(together[0])) == 24
        # A second one finds the prompt's blocks.
        (again,) = await asyncio.gather(collect(client, request("again")))
        assert again[0].num_cached_tokens == 32
        # A live id cannot be used twice.
        first = client.generate(request("twice", max_tokens=300))
        await anext(first)
        with pytest.raises(InvalidRequest, match="twice"):
            await anext(client.generate(request("twice")))
        await first.aclose()  # type: ignore[attr-defined]
        # A prompt that cannot run is refused alone.
        long = Request(id="long", token_ids=(5,) * 600, sampling=SamplingParams())
        (refusal,) = await collect(client, long)
        assert refusal.finish_reason is FinishReason.ERROR
        assert "600 tokens" in refusal.error
        # Clients that leave at any moment leave nothing behind.
        rng = random.Random(0)

        async def leave(i: int) -> bool:
            task = asyncio.create_task(collect(client, request(f"c{i}", max_tokens=400)))
            await asyncio.sleep(rng.random() * 0.02)
            task.cancel()
            (end,) = await asyncio.gather(task, return_exceptions=True)
            if isinstance(end, asyncio.CancelledError):
                return True
            assert len(tokens(end)) == 400  # this thread stood still, and the core did not
            return False

        left = [await asyncio.gather(*(leave(20 * batch + i) for i in range(20))) for batch in range(6)]
        assert sum(map(sum, left)) >= 20
        await collect(client, request("after"))
        await until(lambda: client.stats.num_running == 0 and client.stats.blocks_used == 0)
        assert (client.stats.num_running, client.stats.num_waiting, client.stats.blocks_used) == (0, 0, 0)
        assert client.num_unfinished == 0
        # Draining finishes what runs and takes nothing new.
        last = asyncio.create_task(collect(client, request("last", max_tokens=60)))
        await asyncio.sleep(0.01)
        closing = asyncio.create_task(client.close(drain=True))
        await asyncio.sleep(0)
        with pytest.raises((NotReady, EngineDead)):
            await collect(client, request("late"))
        assert len(tokens(await last)) == 60
        await closing
        assert client.health().status == "dead"

    asyncio.run(scenario())


def test_loading_tells_how_far_it_is(tiny: EngineSpec) -> None:
    async def scenario() -> None:
        told: list[tuple[int, int]] = []
        client = await start(tiny, lambda done, total, part: told.append((done, total)))
        await client.close()
        assert told
        assert told[-1][0] == told[-1][1] == client.ready.summary["weight_bytes"]

    asyncio.run(scenario())


def test_a_core_that_freezes_is_seen_and_may_recover(
    tiny: EngineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.engines.dispatch._STALL_SECONDS_CPU", 1.5)

    async def scenario() -> None:
        client = await start(tiny)
        assert client._process.pid is not None
        os.kill(client._process.pid, signal.SIGSTOP)
        await until(lambda: client.health().status == "stalled")
        os.kill(client._process.pid, signal.SIGCONT)
        await until(lambda: client.health().status == "ok")
        await client.close()

    asyncio.run(scenario())


def test_a_killed_core_is_noticed_by_everybody(tiny: EngineSpec, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        client = await start(tiny)
        assert isinstance(client, ProcessClient)
        running = asyncio.create_task(collect(client, request("r", max_tokens=400)))
        await until(lambda: client.stats.num_running == 1 or running.done())
        assert client._process.pid is not None
        os.kill(client._process.pid, signal.SIGSTOP)
        waiting = asyncio.create_task(collect(client, request("w")))
        await until(lambda: client.num_unfinished >= 1)
        os.kill(client._process.pid, signal.SIGKILL)
        with pytest.raises(EngineDead, match="exit code -9"):
            await asyncio.wait_for(waiting, 60)
        (end,) = await asyncio.gather(running, return_exceptions=True)
        assert isinstance(end, EngineDead) or len(tokens(end)) == 400  # if it was so quick
        assert client.health().status == "dead"
        (line,) = [record for record in caplog.records if record.message == "engine failed"]
        assert "exit code -9" in line.fields["reason"]  # type: ignore[attr-defined]
        with pytest.raises(EngineDead):
            await collect(client, request("x"))
        await client.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("timeout", [0.0, 0.01], ids=["busy", "idle"])
def test_a_core_whose_server_is_gone_stops(timeout: float, tmp_path: Path) -> None:
    """Also in the middle of work: it would hold the device until its longest answer is complete."""
    transport = ZmqTransport(f"ipc://{tmp_path}/core", parent=os.getppid())
    try:
        assert transport.receive(timeout) == []
        transport._parent += 1
        assert transport.receive(timeout) == [(b"", Shutdown(drain=False))]
    finally:
        transport.close()


def test_a_core_that_cannot_start_says_why(tiny: EngineSpec, tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="nowhere"):
        asyncio.run(start(EngineSpec(model=str(tmp_path / "nowhere"))))
    folder = write_llama(tmp_path / "odd", architectures=["LlamoForCausalLM"])
    with pytest.raises(UnknownArchitecture, match="LlamaForCausalLM"):
        asyncio.run(start(EngineSpec(model=str(folder), path=folder)))


UNGUARDED = """
import asyncio
from headrace.config.spec import EngineSpec
from headrace.engines.process import start

async def once(folder):
    client = await start(EngineSpec(model=folder, num_threads=1, kv_cache_bytes=4 << 20, max_num_seqs=8))
    print(client.ready.vocab_size)
    await client.close()

asyncio.run(once({folder!r}))
"""


@pytest.mark.parametrize("how", ["file", "stdin"])
def test_a_script_needs_no_main_guard(how: str, tiny: EngineSpec, tmp_path: Path) -> None:
    """The core's process does not run the caller's script again."""
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED.format(folder=str(tiny.path)))
    with script.open() as text:
        done = subprocess.run(
            [sys.executable, str(script) if how == "file" else "-"],
            stdin=text if how == "stdin" else None,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=150,
        )
    assert (done.returncode, done.stdout) == (0, "300\n"), done.stderr
