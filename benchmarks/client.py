"""The bulk client against the client it stands in for and AsyncOpenAI, on one local server.

    python -m benchmarks.client [--requests 8000] [--rounds 5] [--stream 2097152] [--record]

The server (a process of its own) answers ``/v1/embeddings`` with 1,024 floats a text, as JSON, base64 or raw. One text
of 2.4 KB a request, 64 requests in flight. Each contestant runs in a fresh process; rounds interleave them, so that
whatever else the machine does hits all alike: compare the ratios of one round, not rates of different ones.
Metrics: ``requests_s``; ``cpu_us`` a request (client process, user and system); ``ratio`` to the original's rate with
JSON in the same round (median, and least and most as ``spread``). ``--stream N`` sends N short inputs, 128 a request,
through ``embed_stream`` and reports inputs/s and the growth of resident memory.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import multiprocessing
import os
import platform
import random
import resource
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, ClassVar

DIMENSIONS = 1024
TEXT = "lorem ipsum dolor sit amet " * 90
WIDTH = 64
CONTESTANTS = {
    "ours json": 1.0,
    "ours json numpy": 1.0,
    "ours json 2 processes": 1.0,
    "ours base64": 1.0,
    "ours base64 numpy": 1.0,
    "ours bytes numpy": 1.0,
    "original json": 1.0,
    "original json numpy": 1.0,
    "original base64": 1.0,
    "AsyncOpenAI json": 0.05,  # of the requests: it is slow
    "AsyncOpenAI default": 0.05,  # asks for base64 and decodes it
}


# -- the server --------------------------------------------------------------------------------------------


class _Server(asyncio.Protocol):
    replies: ClassVar[dict[tuple[str, int], bytes]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            at = head.find(b"content-length:")
            stop = end + 4 + int(head[at + 15 :].split(b"\r\n", 1)[0])
            if len(self.buffer) < stop:
                return
            body, self.buffer = self.buffer[end + 4 : stop], self.buffer[stop:]
            asked = json.loads(body)
            key = (asked.get("encoding_format", "float"), len(asked["input"]))
            if key not in self.replies:
                self.replies[key] = _reply(*key)
            self.transport.write(self.replies[key])


def _reply(form: str, count: int) -> bytes:
    rng = random.Random(0)
    row = [rng.gauss(0, 0.03) for _ in range(DIMENSIONS)]
    packed = struct.pack(f"<{DIMENSIONS}f", *row)
    vector: Any = [float(f"{x:.9g}") for x in struct.unpack(f"<{DIMENSIONS}f", packed)]
    if form == "base64":
        vector = base64.b64encode(packed).decode()
    data = [{"object": "embedding", "index": i, "embedding": vector} for i in range(count)]
    about = {"object": "list", "model": "m", "usage": {"prompt_tokens": count, "total_tokens": count}}
    body = json.dumps({**about, "data": data}, separators=(",", ":")).encode()
    lines = "content-type: application/json"
    if form == "bytes":
        body = packed * count
        lines = f"content-type: application/octet-stream\r\nmetadata: {json.dumps(about)}"
    return f"HTTP/1.1 200 OK\r\n{lines}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def _serve(pipe: Any) -> None:
    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(_Server, "127.0.0.1", 0, backlog=2048)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


# -- the contestants ---------------------------------------------------------------------------------------


def _bulk(module: Any, url: str, words: list[str]) -> Callable[[int], None]:
    more = {"processes": 2} if "processes" in words else {}
    client = module.PerformanceClient(url, "k", **more)
    wanted = module.RequestProcessingPreference(max_concurrent_requests=WIDTH, batch_size=1)
    form = next((word for word in words if word in ("base64", "bytes")), None)

    def go(count: int) -> None:
        response = client.embed([TEXT] * count, "m", form, preference=wanted)
        assert len(response.data) == count
        if "numpy" in words:
            assert response.numpy().shape == (count, DIMENSIONS)

    return go


def _openai(url: str, words: list[str]) -> Callable[[int], None]:
    import openai

    form: Any = {"encoding_format": "float"} if "json" in words else {}

    async def main(count: int) -> None:
        turns = iter(range(count))
        async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="k") as client:

            async def worker() -> None:
                for _ in turns:
                    reply = await client.embeddings.create(input=[TEXT], model="m", **form)
                    assert len(reply.data[0].embedding) == DIMENSIONS

            await asyncio.gather(*(worker() for _ in range(WIDTH)))

    return lambda count: asyncio.run(main(count))


def contestant(name: str, url: str, count: int) -> dict[str, float]:
    """Warm up, run, measure. Called in a process of its own."""
    who, *words = name.split()
    if "numpy" in words:
        import numpy  # noqa: F401  (its import is not the client's cost)
    if who == "AsyncOpenAI":
        go = _openai(url, words)
    elif who == "ours":
        import headrace.client as module

        go = _bulk(module, url, words)
    else:
        import baseten_performance_client as module

        go = _bulk(module, url, words)
    go(1200 if "processes" in words else WIDTH)
    before, begun = _cpu(), time.perf_counter()
    go(count)
    seconds = time.perf_counter() - begun
    return {"requests_s": count / seconds, "cpu_us": (_cpu() - before) / count * 1e6}


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def stream(url: str, count: int) -> dict[str, float]:
    """Many short inputs in constant memory."""
    import numpy as np

    import headrace.client as module

    client = module.PerformanceClient(url, "k")
    wanted = module.RequestProcessingPreference(
        max_concurrent_requests=16, batch_size=128, max_chars_per_request=1 << 20
    )
    texts = (f"input number {i}" for i in range(count))
    total, seen, first = np.zeros(DIMENSIONS), 0, 0
    begun = time.perf_counter()
    for part in client.embed_stream(texts, "m", "base64", preference=wanted):
        table = part.numpy()
        total += table.sum(axis=0)
        seen += len(table)
        if not first and seen >= count // 20:
            first = _resident()
    assert seen == count
    seconds = time.perf_counter() - begun
    return {"inputs_s": count / seconds, "rss_growth_bytes": _resident() - first, "rss_bytes": _resident()}


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# -- the record --------------------------------------------------------------------------------------------


def _in_a_process(*words: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.client", *words], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stream", type=int, default=0, metavar="INPUTS")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    parser.add_argument("--commit", help=argparse.SUPPRESS)
    parser.add_argument("--results", help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, url, count = args.one
        print(json.dumps(stream(url, int(count)) if name == "stream" else contestant(name, url, int(count))))
        return
    from benchmarks.common import Recorder  # not at the top: contestants are measured without torch

    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs,), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{ours.recv()}"
    recorder = Recorder("client", args)
    try:
        _compare(recorder, url, args.requests, args.rounds)
        if args.stream:
            for metric, value in _in_a_process("--one", "stream", url, str(args.stream)).items():
                _row(recorder, f"stream {args.stream}x1 base64", metric, value)
    finally:
        server.terminate()


def _compare(recorder: Any, url: str, requests: int, rounds: int) -> None:
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for _ in range(rounds):
        for name, share in CONTESTANTS.items():
            runs[name].append(_in_a_process("--one", name, url, str(int(requests * share))))
    base = [run["requests_s"] for run in runs["original json"]]
    for name, found in runs.items():
        for metric in ("requests_s", "cpu_us"):
            value = statistics.median(run[metric] for run in found)
            if metric == "cpu_us" and "processes" in name:
                continue  # the helpers' time is not in it
            _row(recorder, name, metric, value)
        ratios = [run["requests_s"] / other for run, other in zip(found, base)]
        spread = [round(min(ratios), 3), round(max(ratios), 3)]
        _row(recorder, name, "ratio", statistics.median(ratios), spread=spread, rounds=rounds)


def _row(recorder: Any, case: str, metric: str, value: float, **more: Any) -> None:
    """``precision`` is that of the vectors."""
    recorder.row(model="", precision="float32", case=case, metric=metric, value=value, **more, **_machine())


def _machine() -> dict[str, Any]:
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": _cpu_name(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 1),
    }


def _cpu_name() -> str:
    with open("/proc/cpuinfo") as file:
        return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "")


if __name__ == "__main__":
    main()
