"""The further HTTP processes of a server, kept by the first one: started, watched, replaced, asked, ended.

All listen on one port (SO_REUSEPORT: the kernel deals new connections out) and are clients of the same cores.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import msgspec

from headrace.engines.process import ProcessClient
from headrace.errors import ConfigError, EngineError
from headrace.serving.front_plan import COUNTS, UP, FrontPlan
from headrace.serving.metrics import Counts
from headrace.serving.places import SharedPlaces
from headrace.serving.state import Model, ServerOptions

__all__ = ["Fronts"]

log = logging.getLogger(__name__)
_ASK_SECONDS = 1.0  # between two looks at everybody's counts, and for one answer
_STABLE_SECONDS = 10.0  # who lived so long is replaced at once
_LONGEST_PAUSE = 30.0
_decoder = msgspec.msgpack.Decoder(Counts)


@dataclass(slots=True)
class _Front:
    """One process and its successors.

    Attributes:
        name: what the cores know the present one by.
        last: what it had counted when it was last asked.
    """

    row: int
    process: Process
    name: bytes = b""
    socket: str = ""
    up_since: float = 0.0
    failures: int = 0
    last: Counts = field(default_factory=Counts)


class Fronts:
    """Args:
    models: of the server; they are shared once they are loaded.
    options: of the server.
    """

    def __init__(self, models: Sequence[Model], options: ServerOptions) -> None:
        self._models, self._options = models, options
        self._folder = Path(tempfile.mkdtemp(prefix="headrace-"))
        self.socket = str(self._folder / "first.sock")
        self._file = self._folder / "places"
        SharedPlaces.create(self._file, len(models), options.api_server_count)
        self.places = SharedPlaces(self._file, [model.name for model in models], 0)
        self._fronts: list[_Front] = []
        self._gone = Counts()  # what those counted that are no more
        self._tasks: list[asyncio.Task[None]] = []
        self._made = 0
        self._stopping = False

    async def start(self) -> None:
        """Start interpreters; they import while the models load."""
        for row in range(1, self._options.api_server_count):
            self._fronts.append(_Front(row, await _interpreter()))

    async def join(self, port: int) -> None:
        """Give all of them the loaded models, and wait until they listen. Raises EngineError."""
        self._options = msgspec.structs.replace(self._options, port=port)
        await asyncio.gather(*(self._open(front) for front in self._fronts))
        self._tasks = [asyncio.create_task(self._keep(front)) for front in self._fronts]
        self._tasks.append(asyncio.create_task(self._poll()))

    async def counts(self) -> list[Counts]:
        """What the others have counted, those included that are gone."""
        await asyncio.gather(*(self._ask(front) for front in self._fronts))
        return [self._gone, *(front.last for front in self._fronts)]

    def drain(self) -> None:
        """Tell all to take nothing new, finish what runs, and end."""
        self._stopping = True
        for front in self._fronts:
            if front.process.returncode is None:
                front.process.send_signal(signal.SIGTERM)

    async def close(self) -> None:
        """Wait for their end, which `drain` began; the cores must live until then."""
        if not self._stopping:
            self.drain()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.drain()  # again: the others may have been joined by one that was being replaced
        limit = self._options.drain_seconds + 10.0
        for front in self._fronts:
            try:
                await asyncio.wait_for(front.process.wait(), limit)
            except TimeoutError:
                front.process.kill()
                await front.process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    # One process -----------------------------------------------------------------------------------------

    def _cores(self) -> list[ProcessClient]:
        cores = [model.engine.client for model in self._models]
        for core in cores:
            if not isinstance(core, ProcessClient):
                raise ConfigError(
                    "several HTTP processes need engine cores in processes of their own",
                    param="api_server_count",
                )
        return cores  # type: ignore[return-value]

    async def _open(self, front: _Front) -> None:
        """Hand it its plan and wait until it listens. Raises EngineError when it ends instead."""
        self._made += 1
        front.name = f"front-{front.row}-{self._made}".encode()
        front.socket = str(self._folder / f"{front.name.decode()}.sock")
        attachments = tuple(core.share(front.name) for core in self._cores())
        plan = FrontPlan(
            self._options, attachments, front.row, os.getpid(), self.socket, front.socket, str(self._file)
        )
        stdin, stdout = front.process.stdin, front.process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(pickle.dumps(plan))
        stdin.close()
        if await stdout.readline() != UP:
            code = await front.process.wait()
            raise EngineError(
                f"an HTTP process ended with {code} before it listened; its standard error says why"
            )
        front.up_since = time.monotonic()

    async def _keep(self, front: _Front) -> None:
        """Replace it whenever it ends, more slowly if it keeps ending."""
        while True:
            code = await front.process.wait()
            if self._stopping:
                return
            self._bury(front)
            stable = time.monotonic() - front.up_since > _STABLE_SECONDS
            front.failures = 0 if stable else front.failures + 1
            pause = min(_LONGEST_PAUSE, 2.0 ** (front.failures - 2)) if front.failures > 1 else 0.0
            told = {"process": front.row, "exit_code": code, "replaced_in_seconds": pause}
            log.error("HTTP process ended", extra={"fields": told})
            await asyncio.sleep(pause)
            if self._stopping:
                return
            front.process = await _interpreter()
            try:
                await self._open(front)
            except (EngineError, OSError) as error:
                log.error("HTTP process not replaced", extra={"fields": {"reason": str(error)}})

    def _bury(self, front: _Front) -> None:
        """Nobody waits any more for what it had in flight."""
        for core in self._cores():
            core.forget(front.name)
        self.places.clear(front.row)
        front.last.ended()
        self._gone.add(front.last)
        front.last = Counts()

    async def _ask(self, front: _Front) -> None:
        """Learn its counts; what does not answer keeps those it told last."""
        name = front.name
        if not front.socket:  # it waits for its plan
            return
        try:
            async with (
                aiohttp.ClientSession(
                    connector=aiohttp.UnixConnector(front.socket),
                    timeout=aiohttp.ClientTimeout(total=_ASK_SECONDS),
                ) as session,
                session.get(f"http://localhost{COUNTS}") as reply,
            ):
                counts = _decoder.decode(await reply.read())
        except (aiohttp.ClientError, TimeoutError, OSError):
            return
        if front.name == name:  # not buried meanwhile
            front.last = counts

    async def _poll(self) -> None:
        """So that little is lost when one is killed."""
        while True:
            await asyncio.sleep(_ASK_SECONDS)
            await asyncio.gather(*(self._ask(front) for front in self._fronts))


async def _interpreter() -> Process:
    """A process that waits for its plan."""
    path = os.pathsep.join(path for path in sys.path if path)
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "headrace.serving.front_process",
        stdin=PIPE, stdout=PIPE, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
