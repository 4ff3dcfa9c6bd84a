"""The process of a core, started before it is known what it will run."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys

from headrace.config.spec import EngineSpec

__all__ = ["CoreChild", "remove_socket"]

MODULE = ("headrace.engines.core_process",)  # benchmarks put another one here


class CoreChild:
    """Runs ``headrace.engines.core_process``: it imports what every core needs, and waits for its spec.

    Not by multiprocessing: that would run the caller's script once more in the child. Without a spec it ends when
    this process does.

    Args:
        spec: its device and environment hold from the start; the rest is what `give` will say.
    """

    def __init__(self, spec: EngineSpec) -> None:
        path = os.pathsep.join(path for path in sys.path if path)
        self._address = ""
        self._process = subprocess.Popen(
            [sys.executable, "-m", *MODULE, spec.device, str(os.getpid())],
            stdin=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path} | dict(spec.environment),
        )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def give(self, spec: EngineSpec, address: str) -> None:
        """Tell it what to run, and where to listen."""
        assert self._process.stdin is not None
        self._address = address
        with contextlib.suppress(BrokenPipeError):  # it died already: the caller sees that
            self._process.stdin.write(pickle.dumps((spec, address, os.getpid())))
            self._process.stdin.close()

    def end(self) -> None:
        """Kill it if it runs; its socket goes with it."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        remove_socket(self._address)


def remove_socket(address: str) -> None:
    """What a killed process leaves of ``ipc://PATH``."""
    if address.startswith("ipc://"):
        with contextlib.suppress(OSError):
            os.unlink(address.removeprefix("ipc://"))
