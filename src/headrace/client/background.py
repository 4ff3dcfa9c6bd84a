"""One event loop on a daemon thread for the whole process: both faces of the client run on it.

So there is one connection pool whatever the caller is (a script, threads, several event loops in turn), and
the health checks have a place to live.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

__all__ = ["async_face", "describe", "loop", "run", "soon", "start", "sync_face"]

S = TypeVar("S")
P = ParamSpec("P")
R = TypeVar("R")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_thread: threading.Thread | None = None


def loop() -> asyncio.AbstractEventLoop:
    """The running background loop, started on first use (and again in a forked child)."""
    global _loop, _thread
    with _lock:
        if _loop is None or _thread is None or not _thread.is_alive():
            _loop = asyncio.new_event_loop()
            _thread = threading.Thread(target=_serve, args=(_loop,), name="headrace-client", daemon=True)
            _thread.start()
        return _loop


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()


def _forget() -> None:
    global _loop, _thread, _lock
    _loop = _thread = None
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget)


@atexit.register
def _stop() -> None:
    if _loop is not None and _thread is not None and _thread.is_alive():
        _loop.call_soon_threadsafe(_loop.stop)
        _thread.join(1.0)


def soon(call: Callable[..., object], *args: object) -> None:
    """Call on the background loop if it runs; from any thread, finalizers included."""
    if _loop is not None and _thread is not None and _thread.is_alive():
        _loop.call_soon_threadsafe(call, *args)


def start(work: Coroutine[Any, Any, R]) -> concurrent.futures.Future[R]:
    """Begin ``work`` on the background loop; cancelling the future cancels it there."""
    if threading.current_thread() is _thread:
        work.close()
        raise RuntimeError("the client was called from its own event loop, which would wait for itself")
    return asyncio.run_coroutine_threadsafe(work, loop())


def run(work: Coroutine[Any, Any, R]) -> R:
    """Wait for ``work``. Ctrl-C cancels it, waits until its connections are closed, and goes on upwards."""
    done = threading.Event()

    async def watched() -> R:
        try:
            return await work
        finally:
            done.set()

    future = start(watched())
    try:
        return future.result()
    except BaseException:
        if future.cancel():  # only when we were interrupted: a finished future cannot be cancelled
            done.wait(5.0)
        raise


def sync_face(method: Callable[Concatenate[S, P], Coroutine[Any, Any, R]]) -> Callable[Concatenate[S, P], R]:
    """The blocking twin of a coroutine method."""

    def face(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return run(method(self, *args, **kwargs))

    describe(face, method, "")
    return face


def async_face(
    method: Callable[Concatenate[S, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """The awaitable twin, for the caller's own loop; cancelling the task cancels the work."""

    async def face(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await asyncio.wrap_future(start(method(self, *args, **kwargs)))

    describe(face, method, "async_")
    return face


def describe(face: Any, method: Any, prefix: str) -> None:
    face.__doc__ = method.__doc__
    face.__name__ = prefix + method.__name__.lstrip("_")
    face.__wrapped__ = method  # inspect.signature and help() show the real arguments
