"""The whole house: `headrace serve` as a process, a tiny random model, the openai client and rude clients."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

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


async def settled(server: ServeProcess) -> None:
    for _ in range(100):
        if server.metric("headrace_engine_running", "tiny") == 0:
            break
        await asyncio.sleep(0.1)


def check_rudeness(server: ServeProcess, count: int) -> None:
    assert server.metric("headrace_kv_blocks_used", "tiny") == 0
    asyncio.run(rude(server.url, count, 24))
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    reply = client.completions.create(
        model="tiny", prompt="still there?", max_tokens=5, extra_body={"ignore_eos": True}
    )
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 5
    asyncio.run(settled(server))
    assert server.metric("headrace_kv_blocks_used", "tiny") == 0
    assert server.metric("headrace_engine_running", "tiny") == 0


def test_rude_clients_leave_nothing_behind(server: ServeProcess) -> None:
    check_rudeness(server, 200)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_thousand_rude_clients_leave_nothing_behind(server: ServeProcess) -> None:
    check_rudeness(server, 2000)


def test_sigterm_drains(server: ServeProcess) -> None:
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
    assert server.process.wait(30) == 0
