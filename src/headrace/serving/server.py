"""The life of a server: listen, load, serve, drain, end."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable

from aiohttp import web

from headrace.config.spec import EngineSpec
from headrace.errors import ConfigError, EngineDead
from headrace.llm import AsyncEngine
from headrace.serving.app import make_app
from headrace.serving.faults import Runner
from headrace.serving.fronts import Fronts
from headrace.serving.places import Places
from headrace.serving.state import Model, Models, ServerOptions, State

__all__ = ["Server", "serve"]

log = logging.getLogger(__name__)
StartEngine = Callable[[EngineSpec], Awaitable[AsyncEngine]]
_WATCH = 1.0  # seconds between looks at the engines' state
_BACKLOG = 2048  # connections that wait to be accepted: many clients begin at once
_LAST_WORDS = 2.0  # seconds for cancelled handlers to finish


class Server:
    """One HTTP process and its engines; with ``options.api_server_count`` the first of several.

    It listens before its models are loaded: /health answers at once, the rest 503 until /ready is 200.

    Args:
        start_engine: makes the engine of a model.
        places: those of all HTTP processes, if this is a further one.
        first: the Unix socket of the first HTTP process, if this is a further one.
    """

    def __init__(
        self,
        models: list[Model],
        options: ServerOptions,
        start_engine: StartEngine = AsyncEngine.start,
        *,
        places: Places | None = None,
        first: str | None = None,
    ) -> None:
        known = Models(models)
        self._fronts: Fronts | None = None
        if options.api_server_count > 1 and first is None:
            self._fronts = Fronts(models, options)
            places = self._fronts.places
        self.state = State(known, options, places, jobs=first is None)
        self._first = first
        self._start_engine = start_engine
        self._runner = Runner(
            make_app(self.state, first),
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=_LAST_WORDS,
            keepalive_timeout=75.0,
            auto_decompress=False,  # serving/body.py does it, within limits
        )
        self._site: web.TCPSite | None = None

    @property
    def url(self) -> str:
        """Where it listens, with the port that the system chose when 0 was asked for."""
        host, port = self._runner.addresses[0][:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def listen(self) -> None:
        """Open the port; raises ConfigError when that is not possible."""
        options = self.state.options
        await self._runner.setup()
        shared = options.api_server_count > 1
        self._site = web.TCPSite(
            self._runner, options.host, options.port, backlog=_BACKLOG, reuse_port=shared
        )
        try:
            if shared and self._first is None:
                await _check_free(options.host, options.port)
            await self._site.start()
        except OSError as error:
            await self._runner.cleanup()
            raise ConfigError(
                f"cannot listen on {options.host}:{options.port}: {error.strerror or error}; "
                "choose another --port or stop what uses it",
                param="port",
            ) from error
        if self._fronts is not None:
            self.state.joining = True
            self.state.other_counts = self._fronts.counts
            await web.UnixSite(self._runner, self._fronts.socket).start()
        if self.state.batches is not None:
            self.state.batches.start(self.url)

    async def load(self) -> None:
        """Start the engines that are not there yet, all at once; the first failure is raised.

        Further HTTP processes start meanwhile, and listen when this returns.
        """
        if self._fronts is not None:
            await self._fronts.start()
        async with asyncio.TaskGroup() as group:
            for model in self.state.models.all:
                if model.loaded is None:
                    group.create_task(self._load(model))
        if self._fronts is not None:
            await self._fronts.join(self._runner.addresses[0][1])
            self.state.joining = False

    async def _load(self, model: Model) -> None:
        engine = await self._start_engine(model.spec)
        model.loaded = engine
        if engine.text is not None and not engine.embeds:
            _ = model.format  # a wrong name of a parser ends the start, not the first request
        log.info("model ready", extra={"fields": {"model": model.name, **engine.client.ready.summary}})

    async def all_dead(self) -> EngineDead:
        """Wait until no engine is left alive; the error that says so."""
        while True:
            await asyncio.sleep(_WATCH)
            found = [model.loaded.health() for model in self.state.models.all if model.loaded is not None]
            if found and all(health.status == "dead" for health in found):
                reasons = "; ".join(dict.fromkeys(health.reason for health in found))
                return EngineDead(f"no engine is left ({reasons}); the server ends, to be started anew")

    async def close(self) -> None:
        """Take nothing new, let what runs finish within ``drain_seconds``, stop the engines."""
        state = self.state
        if state.batches is not None:
            await state.batches.stop()
        state.draining = True
        if self._fronts is not None:
            self._fronts.drain()
        if self._site is not None:
            await self._site.stop()
        running = [task for task in state.running if task is not asyncio.current_task()]
        if running:
            log.info("draining", extra={"fields": {"requests": len(running)}})
            _, late = await asyncio.wait(running, timeout=state.options.drain_seconds)
            for task in late:
                task.cancel()
            if late:
                log.warning("requests cut off", extra={"fields": {"requests": len(late)}})
                await asyncio.wait(late, timeout=_LAST_WORDS)
        if self._fronts is not None:
            await self._fronts.close()
        await self._runner.cleanup()
        await state.grammars.close()
        for model in state.models.all:
            if model.loaded is not None:
                await model.loaded.close(drain=False)


async def _check_free(host: str, port: int) -> None:
    """Raise OSError when somebody listens there: a shared port would be shared with strangers, too."""
    server = await asyncio.get_running_loop().create_server(asyncio.Protocol, host, port)
    server.close()
    await server.wait_closed()


async def serve(
    server: Server, on_listen: Callable[[Server], None], on_ready: Callable[[Server], None]
) -> None:
    """Run until SIGTERM or SIGINT, then drain.

    Raises what kept a model from loading, and EngineDead when no engine is left: an empty server would only
    answer 503, and nothing would start it anew.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await server.listen()
    on_listen(server)
    loading = asyncio.create_task(server.load())
    stopping = asyncio.create_task(stop.wait())
    dying = asyncio.create_task(server.all_dead())
    try:
        await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not stop.is_set():
            try:
                loading.result()
            except BaseExceptionGroup as group:
                raise group.exceptions[0] from None
            on_ready(server)
            await asyncio.wait((stopping, dying), return_when=asyncio.FIRST_COMPLETED)
            if not stop.is_set():
                raise dying.result()
    finally:
        for task in (loading, stopping, dying):
            task.cancel()
        await asyncio.gather(loading, stopping, dying, return_exceptions=True)
        await server.close()
