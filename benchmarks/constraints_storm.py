"""What a storm of grammars does to others: inter-token times of streams with and without it, on a real server.

    python -m benchmarks.constraints_storm [--model smollm2-135m] [--seconds 30] [--rounds 3] [--record]

Starts ``headrace serve``. A few streams of free text run the whole time. In turn they have the server to themselves
(``quiet``), share it with short plain requests, as many at a time as the storm's (``plain``), and with a storm of
grammars that are catastrophic, recursive or enormous, each a new one (``storm``). Storm and plain requests ask for one
token. The gaps between the events of a stream, as its client sees them, are pooled over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
import numpy as np

from benchmarks.common import Recorder, arguments

ASK = {"messages": [{"role": "user", "content": "Say something."}], "max_tokens": 1}


def _nested(levels: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema, "b": schema}}
    return schema


def grammars(seed: int) -> Iterator[dict[str, Any]]:
    """Request fields; no two alike."""
    rng = random.Random(seed)
    for turn in itertools.count():
        salt = f"{rng.getrandbits(48):012x}"
        yield {"guided_regex": f"{salt}(x|xx|xxx|xxxx)*" * 200}
        yield {"guided_regex": f"((((a{{1,100}}){{1,100}}){{1,100}}){{1,100}}){salt}"}
        yield {"guided_regex": f"(.|\\n)*{salt}[a-m](.|\\n){{400}}"}
        yield {"guided_grammar": f'start: e "{salt}"\ne: e e e | "x" e | ("a" | "b"?)*'}
        yield {"guided_grammar": "root ::= root root | " + " | ".join(f'"{salt}{i}"' for i in range(3000))}
        yield {
            "guided_json": {
                "$defs": {salt: {"anyOf": [{"$ref": f"#/$defs/{salt}"}] * 60}},
                "$ref": f"#/$defs/{salt}",
            }
        }
        yield {"guided_json": {**_nested(11), "$id": f"urn:{salt}"}}
        yield {
            "guided_json": {
                "type": "object",
                "properties": {f"{salt}{i}": {"type": "string"} for i in range(9000)},
            }
        }
        yield {
            "guided_json": {
                "type": "object",
                "properties": {f"{salt}{i}": {"type": "integer"} for i in range(2500)},
            }
        }
        yield {"guided_json": {"enum": [f"{salt} number {i}" for i in range(12_000)]}}
        yield {
            "guided_json": {
                "allOf": [{"pattern": f"({salt}|a{{{i},}}b*)+"} for i in range(60)],
                "type": "string",
            }
        }
        yield {
            "tool_choice": "required",
            "tools": [
                {"type": "function", "function": {"name": f"t{salt}{i}", "parameters": _nested(3)}}
                for i in range(128)
            ],
        }
        if turn % 4 == 3:
            yield {"guided_json": {**_nested(80), "$id": f"urn:{salt}"}}


def _storm(url: str, workers: int, kind: str, seed: int) -> None:
    """Runs in a process of its own until it is ended; tells the statuses it saw on SIGTERM."""
    seen: collections.Counter[str] = collections.Counter()

    async def worker(session: aiohttp.ClientSession, number: int) -> None:
        source = grammars(seed * 1000 + number) if kind == "storm" else itertools.repeat({})
        for _ in range(number):  # not all of one kind at a time
            next(source)
        for extra in source:
            body = json.dumps({"model": "m", **ASK, **extra}).encode()
            async with session.post(f"{url}/v1/chat/completions", data=body) as reply:
                text = await reply.text()
                seen[str(reply.status)] += 1
                if reply.status not in (200, 400):
                    seen[f"{reply.status} {text[:200]}"] += 1

    async def run() -> None:
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        loop.add_signal_handler(signal.SIGTERM, done.set)
        headers = {"content-type": "application/json"}
        async with aiohttp.ClientSession(headers=headers) as session:
            tasks = [asyncio.create_task(worker(session, i)) for i in range(workers)]
            await done.wait()
            for task in tasks:
                task.cancel()
            for found in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(found, Exception):
                    seen[f"client: {found!r}"] += 1

    os.nice(5)  # the client is no part of what is measured
    asyncio.run(run())
    print(kind, dict(seen), file=sys.stderr, flush=True)


async def _streams(url: str, count: int, seconds: float) -> list[float]:
    """Milliseconds between events of ``count`` streams over so many seconds."""
    gaps: list[float] = []
    end = time.perf_counter() + seconds

    async def one(session: aiohttp.ClientSession, number: int) -> None:
        turn = 0
        while time.perf_counter() < end:
            turn += 1
            body = {"model": "m", "prompt": f"{number} {turn} Once upon a time", "max_tokens": 400, "stream": True,
                    "ignore_eos": True, "seed": number}  # fmt: skip
            last = None
            async with session.post(f"{url}/v1/completions", json=body) as reply:
                reply.raise_for_status()
                async for line in reply.content:
                    if not line.startswith(b"data: {"):
                        continue
                    now = time.perf_counter()
                    if last is not None:
                        gaps.append((now - last) * 1e3)
                    last = now
                    if now > end:
                        return

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(one(session, i) for i in range(count)))
    return gaps


@contextmanager
def _serving(*options: str) -> Iterator[str]:
    command = [sys.executable, "-m", "headrace.cli.main", "serve", "--port", "0", *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    try:
        assert process.stdout is not None
        url = next(found[1] for line in process.stdout if (found := re.search(r"on (http://\S+)", line)))
        while True:
            try:
                with urllib.request.urlopen(f"{url}/ready", timeout=5):
                    break
            except urllib.error.URLError:
                if process.poll() is not None:
                    raise RuntimeError(f"the server ended with {process.returncode}") from None
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Gaps by phase."""
    gaps: dict[str, list[float]] = {"quiet": [], "plain": [], "storm": []}
    with _serving(f"m={args.model}", "--max-model-len", "1024", *args.serve) as url:
        asyncio.run(_streams(url, args.streams, 3.0))
        for turn in range(args.rounds):
            for phase, found in gaps.items():
                storm = None
                if phase != "quiet":
                    storm = multiprocessing.Process(target=_storm, args=(url, args.workers, phase, turn))
                    storm.start()
                    time.sleep(3.0)
                found += asyncio.run(_streams(url, args.streams, args.seconds))
                if storm is not None:
                    storm.terminate()
                    storm.join(20)
                time.sleep(3.0)
    return gaps


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--workers", type=int, default=6, help="storm requests at a time")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each phase")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--serve", nargs=argparse.REMAINDER, default=[], help="further options of headrace serve"
    )
    args = parser.parse_args()
    gaps = measure(args)
    recorder = Recorder("constraints", args)
    found = {phase: {p: float(np.percentile(v, p)) for p in (50, 90, 99, 99.9)} for phase, v in gaps.items()}
    for phase, values in found.items():
        recorder.row(
            model=args.model, precision="", case=f"{args.streams} streams, {phase}", metric="gap_p99_ms",
            value=values[99], p50=round(values[50], 2), p90=round(values[90], 2), p999=round(values[99.9], 2),
            events=len(gaps[phase]), over_quiet=round(values[99] / found["quiet"][99], 3),
        )  # fmt: skip


if __name__ == "__main__":
    main()
