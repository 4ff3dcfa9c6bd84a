"""A further HTTP process of a server, run as ``python -m headrace.serving.front_process``.

It reads its FrontPlan (pickled by the first process) from standard input, attaches to the engine cores, listens on the
server's port beside the others, says so with a line on standard output, and ends with SIGTERM or its parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import sys
from pathlib import Path

import msgspec
from aiohttp import web

from headrace.config import env
from headrace.config.spec import EngineSpec
from headrace.llm import AsyncEngine
from headrace.serving import logs
from headrace.serving.front_plan import COUNTS, UP, FrontPlan
from headrace.serving.places import SharedPlaces
from headrace.serving.server import Server
from headrace.serving.state import Model

__all__ = ["main"]

_PARENT = 0.25  # seconds between looks at the parent


async def _serve(plan: FrontPlan) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    models = [Model(attachment.spec) for attachment in plan.attachments]
    by_name = {attachment.spec.name: attachment for attachment in plan.attachments}

    async def attach(spec: EngineSpec) -> AsyncEngine:
        return await AsyncEngine.attach(by_name[spec.name])

    places = SharedPlaces(Path(plan.places), [model.name for model in models], plan.row)
    server = Server(models, plan.options, attach, places=places, first=plan.first)
    counts = await _tell_counts(server, plan.own)
    try:
        await server.load()
        await server.listen()
        sys.stdout.buffer.write(UP)
        sys.stdout.buffer.flush()
        while not stop.is_set() and os.getppid() == plan.parent:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), _PARENT)
    finally:
        await server.close()
        await counts.cleanup()  # last: the first process asks until the end


async def _tell_counts(server: Server, path: str) -> web.AppRunner:
    """Answer GET /counts on a socket of this process's own."""
    metrics = server.state.metrics

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=msgspec.msgpack.encode(metrics.own))

    app = web.Application()
    app.router.add_get(COUNTS, answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.UnixSite(runner, path).start()
    return runner


def main() -> None:
    """Read what to serve from standard input, and serve it."""
    logs.configure(env.log_level())
    data = sys.stdin.buffer.read()
    if not data:  # the first process ended before there was anything to serve
        return
    asyncio.run(_serve(pickle.loads(data)))


if __name__ == "__main__":
    main()
