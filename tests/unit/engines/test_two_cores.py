"""Two cores in one process at once, and one after another: neither notices."""

from __future__ import annotations

import asyncio
from pathlib import Path

from headrace.config.spec import EngineSpec
from headrace.engines.process import InProcessClient, start_in_process
from headrace.types import Request, SamplingParams
from support.tiny_folder import write_llama


async def answers(client: InProcessClient, name: str, *, leave: bool = False) -> list[list[int]]:
    """Tokens of some requests at once; with ``leave`` those of every other one are not waited for."""

    async def one(i: int) -> list[int]:
        sampling = SamplingParams(max_tokens=40, ignore_eos=True, seed=i, temperature=float(i % 2))
        request = Request(id=f"{name}-{i}", token_ids=tuple(range(3, 8 + 7 * i)), sampling=sampling)
        tokens: list[int] = []
        stream = client.generate(request)
        async for output in stream:
            assert not output.error
            tokens += output.token_ids
            if leave and i % 2:
                await stream.aclose()  # type: ignore[attr-defined]
                return []
        return tokens

    return await asyncio.gather(*(one(i) for i in range(6)))


async def alone(spec: EngineSpec) -> list[list[int]]:
    client = await start_in_process(spec)
    try:
        return await answers(client, "alone")
    finally:
        await client.close()


async def together(specs: list[EngineSpec]) -> list[list[list[int]]]:
    clients = [await start_in_process(spec) for spec in specs]
    try:
        await asyncio.gather(*(answers(client, "left", leave=True) for client in clients))
        found = list(await asyncio.gather(*(answers(client, "both") for client in clients)))
        assert [client.num_unfinished for client in clients] == [0, 0]
        return found
    finally:
        await asyncio.gather(*(client.close() for client in clients))


def test_two_cores(tmp_path: Path) -> None:
    folders = [write_llama(tmp_path / "a"), write_llama(tmp_path / "b", num_hidden_layers=3, vocab_size=250)]
    specs = [
        EngineSpec(model=str(folder), device="cpu", overlap=bool(i), max_num_batched_tokens=16)
        for i, folder in enumerate(folders)
    ]
    expected = [asyncio.run(alone(spec)) for spec in specs]
    assert expected[0] != expected[1]
    assert asyncio.run(together(specs)) == expected
    assert asyncio.run(alone(specs[0])) == expected[0]
