"""What the HTTP front end costs a streamed token, in CPU time, without any model.

A scripted engine gives one token a step to every request; a second process reads the streams. The cost is that of
the serving process, in three nested loops over the same tokens: the engine alone, with detokenization, over HTTP.
Their differences are what detokenization and the front end add. What the kernel needs to send (one write a token
and stream) is told apart from what Python needs.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import socket
from collections.abc import Iterator
from contextlib import aclosing
from typing import NamedTuple

from benchmarks.common import Recorder, arguments
from headrace.config.spec import EngineSpec
from headrace.engines.scripted import ScriptedEngine, Step
from headrace.llm import AsyncEngine
from headrace.messages import Ready
from headrace.serving.server import Server
from headrace.serving.state import Model, ServerOptions
from headrace.types import Request, SamplingParams
from support.tiny_text import tiny_text

__all__ = ["main"]

KIT = tiny_text()
WORDS = tuple(KIT.tokenizer.encode("the cat sat on the mat", False))


class Spent(NamedTuple):
    """CPU seconds in this process's own code and in the kernel."""

    user: float
    system: float


def cpu() -> Spent:
    times = os.times()
    return Spent(times.user, times.system)


def spent_since(start: Spent) -> Spent:
    now = cpu()
    return Spent(now.user - start.user, now.system - start.system)


def words(request: Request) -> Iterator[Step]:
    """One token a step, for ever."""
    while True:
        for token in WORDS:
            yield Step((token,))


def make_engine(at_once: int) -> AsyncEngine:
    ready = Ready("dense", 1 << 20, at_once, KIT.tokenizer.vocab_size)
    return AsyncEngine(ScriptedEngine(words, spec=EngineSpec(model="m"), ready=ready), KIT)


async def engine_only(at_once: int, tokens: int) -> Spent:
    """CPU time of the scripted engine."""
    engine = make_engine(at_once)

    async def one(name: int) -> None:
        request = Request(id=str(name), token_ids=(1,), sampling=SamplingParams(max_tokens=tokens))
        async with aclosing(engine.client.generate(request)) as outputs:  # type: ignore[type-var]
            async for _ in outputs:
                pass

    start = cpu()
    await asyncio.gather(*(one(k) for k in range(at_once)))
    return spent_since(start)


async def with_text(at_once: int, tokens: int) -> Spent:
    """CPU time of engine and detokenization."""
    engine = make_engine(at_once)

    async def one() -> None:
        async for _ in engine.generate([1], SamplingParams(max_tokens=tokens)):
            pass

    start = cpu()
    await asyncio.gather(*(one() for _ in range(at_once)))
    return spent_since(start)


async def over_http(at_once: int, tokens: int) -> Spent:
    """CPU time of the whole serving process."""
    server = Server([Model(EngineSpec(model="m"), make_engine(at_once))], ServerOptions(port=0))
    await server.listen()
    reader = multiprocessing.get_context("spawn").Process(target=read_all, args=(server.url, at_once, tokens))
    reader.start()
    while not server.state.running:
        await asyncio.sleep(0.001)
    start = cpu()
    while reader.is_alive():
        await asyncio.sleep(0.05)
    spent = spent_since(start)
    assert reader.exitcode == 0, "the reader failed"
    await server.close()
    return spent


def read_all(url: str, at_once: int, tokens: int) -> None:
    """Open all streams, then read them to their ends."""
    import selectors

    body = json.dumps({"model": "m", "prompt": [1], "max_tokens": tokens, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    host, port = url.removeprefix("http://").split(":")
    selector = selectors.DefaultSelector()
    ends = {}
    for _ in range(at_once):
        sock = socket.create_connection((host, int(port)))
        sock.sendall(head.encode() + body)
        selector.register(sock, selectors.EVENT_READ)
    while selector.get_map():
        for key, _ in selector.select():
            data = key.fileobj.recv(1 << 20)  # type: ignore[union-attr]
            ends[key.fd] = (ends.get(key.fd, b"") + data)[-64:]
            if not data:
                selector.unregister(key.fileobj)
                assert b"[DONE]" in ends[key.fd], ends[key.fd]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 32])
    args = parser.parse_args()
    recorder = Recorder("frontend", args)
    for at_once in args.requests:
        per_token = 1e6 / (at_once * args.tokens)
        engine = asyncio.run(engine_only(at_once, args.tokens))
        text = asyncio.run(with_text(at_once, args.tokens))
        http = asyncio.run(over_http(at_once, args.tokens))
        case = f"{at_once}x1/{args.tokens}"
        rows = {
            "detokenize_us_token": text.user - engine.user,
            "frontend_us_token": http.user - text.user,
            "kernel_us_token": http.system - text.system,
        }
        for metric, value in rows.items():
            recorder.row(
                model="scripted", precision="none", case=case, metric=metric, value=value * per_token
            )


if __name__ == "__main__":
    main()
