"""A server on a thread of this process, for commands that need one for a while."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from headrace.config.spec import EngineSpec
from headrace.serving.server import Server
from headrace.serving.state import Model, ServerOptions

__all__ = ["BackgroundServer"]

T = TypeVar("T")


class BackgroundServer:
    """Listens on a free port of 127.0.0.1 while the context lasts; entering waits until all models are loaded."""

    def __init__(self, specs: Sequence[EngineSpec]) -> None:
        self._models = [Model(spec) for spec in specs]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="server", daemon=True)

    @property
    def url(self) -> str:
        return self._server.url

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _open(self) -> Server:
        server = Server(self._models, ServerOptions(port=0, drain_seconds=0.5))
        await server.listen()
        try:
            await server.load()
        except BaseException as error:
            await server.close()
            if isinstance(error, BaseExceptionGroup):
                raise error.exceptions[0] from None
            raise
        return server

    def __enter__(self) -> BackgroundServer:
        self._thread.start()
        self._server = self._wait(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        self._wait(self._server.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
