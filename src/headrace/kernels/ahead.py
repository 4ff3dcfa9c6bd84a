"""Triton kernels compiled before they are needed, several at once.

A new machine has none of them, and compiling them when each is first launched takes a second or so apiece, one after
another. Here the work that would launch them runs once without launching anything (`noting`), and what it would have
compiled is compiled by as many processes as there are cores, into Triton's cache on disk.

The processes are forked: they inherit what is to be compiled, and they touch no GPU. Each dies with this one.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import logging
import os
import select
import signal
import struct
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch.overrides import TorchFunctionMode
from triton.runtime import driver
from triton.runtime.jit import JITFunction

__all__ = ["Kernels", "Note", "Progress", "noting"]

logger = logging.getLogger("headrace.core")

Progress = Callable[[int, int], None]  # kernels compiled, and in all

_SILENCE = 120.0  # seconds without one more kernel, after which those left are compiled here
_MOST_PROCESSES = 32
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_INDEX = struct.Struct("<i")
_EMPTY = frozenset({torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty})


@dataclass(slots=True)
class _Kernel:
    """Stands for a kernel where launches look for it; asked for anything, it compiles, and gives way."""

    compile: Callable[[], Any]  # from Triton's cache where it is there
    places: list[Callable[[Any], None]] = field(default_factory=list)

    def ready(self) -> Any:
        compiled = self.compile()
        for place in self.places:
            place(compiled)
        return compiled

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ready(), name)


class Kernels(triton.AsyncCompileMode):
    """Kernels that are not compiled yet: stands where Triton expects a way to compile in the background."""

    def __init__(self) -> None:
        super().__init__(executor=None)
        self._noted: dict[str, _Kernel] = {}

    def __len__(self) -> int:
        return len(self._noted)

    def submit(self, key: str, compile_fn: Callable[[], Any], finalize_fn: Callable[[Any], None]) -> Any:
        """Called by Triton for a kernel that it has not; what stands for it until `compile` is returned."""
        kernel = self._noted.setdefault(key, _Kernel(compile_fn))
        kernel.places.append(finalize_fn)
        finalize_fn(kernel)
        return kernel

    def compile(self, progress: Progress | None = None) -> None:
        """Compile all of them, and put them where launches find them.

        What does not compile is told in the log, and again by the step that launches it.
        """
        kernels = list(self._noted.values())
        if len(kernels) > 1:
            _compile_in_processes([kernel.compile for kernel in kernels], progress)
        for kernel in kernels:
            try:
                kernel.ready()
            except Exception as error:
                logger.warning("a kernel does not compile, and steps that need it will fail: %s", error)
        self._noted.clear()


@contextlib.contextmanager
def noting() -> Iterator[Kernels]:
    """Within, Triton kernels are not launched, but noted where they are not compiled yet.

    What they would have written reads as zeros, so that nothing is looked up at places that do not exist.
    """
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    kernels = Kernels()
    JITFunction.run = compile_only
    try:
        with kernels, _Zeros():
            yield kernels
    finally:
        JITFunction.run = run


class Note:
    """A file in Triton's cache which says that all kernels of some work have been compiled there.

    Args:
        work: all that decides which kernels the work needs, beside this package's sources, Triton and the device.
    """

    def __init__(self, work: str, device: torch.device) -> None:
        digest = hashlib.sha256(work.encode())
        digest.update(f"{triton.__version__} {torch.cuda.get_device_properties(device)}".encode())
        root = Path(__file__).parents[1]
        for room in ("kernels", "layers", "models", "quantization", "execution"):
            for file in sorted((root / room).rglob("*.*")):
                if file.suffix in (".py", ".json"):
                    digest.update(file.read_bytes())
        self.path = Path(triton.knobs.cache.dir) / f"headrace-{digest.hexdigest()[:32]}.json"

    def exists(self) -> bool:
        """Whether `write` was called on this cache."""
        return self.path.is_file()

    def write(self, count: int) -> None:
        """So many kernels were missing, and are there now."""
        with contextlib.suppress(OSError):  # a cache that cannot be written: the next start looks again
            partial = self.path.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps({"compiled": count, "seconds_since_1970": int(time.time())}))
            partial.replace(self.path)


class _Zeros(TorchFunctionMode):
    """New memory is zeros."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        return found.zero_() if func in _EMPTY else found


def _compile_in_processes(work: list[Callable[[], Any]], progress: Progress | None) -> None:
    """Call each in a forked process, some at a time; whatever fails there, or has no process, is left to the caller."""
    todo, give = os.pipe()
    done, tell = os.pipe()
    workers: list[int] = []
    parent = os.getpid()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of forking beside threads: they hold no locks here
        for _ in range(min(len(work), _num_cores(), _MOST_PROCESSES)):
            try:
                worker = os.fork()
            except OSError as error:  # a container's limit of processes
                logger.warning(
                    "kernels are compiled by %d processes beside this one: %s", len(workers), error
                )
                break
            if worker == 0:
                os.close(give)
                os.close(done)
                _work(work, todo, tell, parent)  # never returns
            workers.append(worker)
    os.close(todo)
    os.close(tell)
    try:
        if workers:
            os.write(give, b"".join(map(_INDEX.pack, range(len(work)))))  # well below a pipe's 64 KiB
        os.close(give)
        _wait(done, len(work), progress)
    finally:
        os.close(done)
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
            os.waitpid(worker, 0)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def _work(work: list[Callable[[], Any]], todo: int, tell: int, parent: int) -> None:
    """A worker's life: numbers in, numbers out."""
    try:
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        while os.getppid() == parent and (given := os.read(todo, _INDEX.size)):
            try:
                compiled = work[_INDEX.unpack(given)[0]]()
                # Some versions of Triton also compile a launcher in C for each signature.
                driver.active.launcher_cls(compiled.src, compiled.metadata)
            except Exception:
                logger.debug("a kernel did not compile ahead", exc_info=True)
            os.write(tell, given)
    finally:
        os._exit(0)


def _wait(done: int, total: int, progress: Progress | None) -> None:
    """Until all are compiled, the workers are gone, or none has said anything for long."""
    count, since = 0, time.monotonic()
    if progress is not None:
        progress(0, total)
    while count < total:
        ready, _, _ = select.select([done], [], [], 1.0)
        if not ready:
            if time.monotonic() - since > _SILENCE:
                logger.warning("compiling kernels ahead stopped at %d of %d; the rest follows", count, total)
                return
            continue
        given = os.read(done, 64 * _INDEX.size)
        if not given:
            return
        count, since = count + len(given) // _INDEX.size, time.monotonic()
        if progress is not None:
            progress(count, total)
