"""The whole house: `headrace serve` as a process, a tiny random model, the openai client and rude clients."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import openai
import pytest

from support.process import ServeProcess, serving
from support.tiny_folder import write_llama, write_tokenizer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    folder = write_tokenizer(write_llama(tmp_path_factory.mktemp("tiny")))
    with serving(f"tiny={folder}", "--max-num-seqs", "16") as process:
        yield process


def test_streamed_deltas_join_to_the_whole_reply(server: ServeProcess) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    for seed in range(4):
        ask = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "Grüße 🎉"}],
            "temperature": 1.0,
            "seed": seed,
            "max_tokens": 60,
        }
        whole = client.chat.completions.create(**ask)  # type: ignore[call-overload]
        chunks = list(client.chat.completions.create(**ask, stream=True))  # type: ignore[call-overload]
        joined = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert joined == whole.choices[0].message.content
        assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_the_same_seed_gives_the_same_text_in_any_company(server: ServeProcess) -> None:
    async def scenario() -> None:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none")

        async def ask(seed: int) -> str:
            reply = await client.completions.create(
                model="tiny", prompt="Once upon a time", max_tokens=24, temperature=1.0, seed=seed
            )
            return reply.choices[0].text

        alone = [await ask(seed) for seed in range(4)]
        together = await asyncio.gather(*(ask(seed % 4) for seed in range(32)))
        assert list(together) == alone * 8

    asyncio.run(scenario())


async def rude(url: str, count: int, parallel: int) -> None:
    """Requests whose clients leave, run out of time or read a little and hang up, at random moments."""
    rng = random.Random(9)
    gate = asyncio.Semaphore(parallel)
    timeout = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one(i: int) -> None:
            body = {
                "model": "tiny",
                "messages": [{"role": "user", "content": "x" * rng.randint(1, 200)}],
                "max_tokens": rng.randint(1, 250),
                "stream": rng.random() < 0.6,
                "seed": i,
                "ignore_eos": True,
                "n": rng.choice([1, 1, 3]),
            }
            headers = {"Request-Timeout-Ms": str(rng.randint(1, 60))} if rng.random() < 0.3 else {}
            async with gate:
                task = asyncio.ensure_future(
                    session.post(f"{url}/v1/chat/completions", json=body, headers=headers)
                )
                try:
                    async with asyncio.timeout(rng.random() * 0.15):
                        async with await task as reply:
                            assert reply.status in (200, 408, 429), await reply.text()
                            async for _ in reply.content.iter_any():
                                if rng.random() < 0.2:
                                    break
                except (TimeoutError, aiohttp.ClientError):
                    pass
                finally:
                    task.cancel()

        await asyncio.gather(*(one(i) for i in range(count)))


def settled(server: ServeProcess) -> None:
    """Nothing runs, and no block is taken: by what the core told last, which is a second ago at most."""
    names = ("headrace_engine_running", "headrace_kv_blocks_used")
    deadline = time.monotonic() + 60
    while any(server.metric(name, "tiny") for name in names):
        assert time.monotonic() < deadline, [(name, server.metric(name, "tiny")) for name in names]
        time.sleep(0.1)


def check_rudeness(server: ServeProcess, count: int) -> None:
    settled(server)
    asyncio.run(rude(server.url, count, 24))
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    reply = client.completions.create(
        model="tiny", prompt="still there?", max_tokens=5, extra_body={"ignore_eos": True}
    )
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 5
    settled(server)


def test_rude_clients_leave_nothing_behind(server: ServeProcess) -> None:
    check_rudeness(server, 200)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_thousand_rude_clients_leave_nothing_behind(server: ServeProcess) -> None:
    check_rudeness(server, 2000)


def test_sigterm_drains(tmp_path: Path) -> None:
    folder = write_tokenizer(write_llama(tmp_path))
    with serving(f"tiny={folder}") as server:
        check_drain(server)


def check_drain(server: ServeProcess) -> None:
    async def scenario() -> None:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        stream = await client.completions.create(
            model="tiny", prompt="a long one", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        )
        first = await anext(aiter(stream))
        assert first.choices
        server.process.terminate()
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].choices[0].finish_reason == "length"

    asyncio.run(scenario())
    assert server.process.wait(120) == 0


@pytest.mark.slow
def test_a_batch_survives_two_kills_of_the_server(tmp_path: Path) -> None:
    """kill -9 in the middle, twice: every line is answered exactly once."""
    folder = write_tokenizer(write_llama(tmp_path / "tiny"))
    body = {"model": "tiny", "max_tokens": 120, "ignore_eos": True}
    lines = [
        {
            "custom_id": f"r{i}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {**body, "prompt": "x", "seed": i},
        }
        for i in range(150)
    ]
    arguments = (f"tiny={folder}", "--max-num-seqs", "4", "--data-dir", str(tmp_path / "data"))
    batch_id, seen = "", 0
    for _ in range(2):
        with serving(*arguments) as process:
            user = openai.OpenAI(base_url=f"{process.url}/v1", api_key="k")
            if not batch_id:
                data = "".join(json.dumps(line) + "\n" for line in lines).encode()
                stored = user.files.create(file=("in.jsonl", data), purpose="batch")
                batch_id = user.batches.create(
                    input_file_id=stored.id, endpoint="/v1/completions", completion_window="24h"
                ).id
            while (counts := user.batches.retrieve(batch_id).request_counts) is None or (
                counts.completed < seen + 20
            ):
                time.sleep(0.02)
            seen = counts.completed
            assert seen < 150
            process.process.kill()
            process.process.wait()
    with serving(*arguments) as process:
        user = openai.OpenAI(base_url=f"{process.url}/v1", api_key="k")
        while (batch := user.batches.retrieve(batch_id)).status != "completed":
            assert batch.status in ("validating", "in_progress", "finalizing")
            time.sleep(0.05)
        assert batch.output_file_id is not None
        assert batch.error_file_id is None
        rows = [json.loads(row) for row in user.files.content(batch.output_file_id).text.splitlines()]
        assert sorted(row["custom_id"] for row in rows) == sorted(line["custom_id"] for line in lines)
