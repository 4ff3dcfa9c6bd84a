"""`headrace serve` as a user starts it: a process tree of its own on a free port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager


class ServeProcess:
    """A running server; ``url`` is its base without /v1."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url

    def metric(self, name: str, model: str) -> float:
        """One gauge or counter of /metrics."""
        with urllib.request.urlopen(f"{self.url}/metrics") as reply:
            text = reply.read().decode()
        found = re.search(rf'^{name}\{{[^}}]*model="{model}"[^}}]*\}} (\S+)$', text, re.M)
        assert found, f"no metric {name} of {model} in:\n{text}"
        return float(found[1])

    def terminate(self) -> int:
        """SIGTERM and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)


@contextmanager
def serving(*arguments: str, timeout: float = 150.0) -> Iterator[ServeProcess]:
    """Start ``headrace serve --port 0 ...`` and wait until it is ready; killed at the end if still there."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}  # PYTHONPATH is conftest's
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace.cli.main", "serve", "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=env,
    )
    try:
        assert process.stdout is not None
        url = ""
        for line in process.stdout:
            found = re.search(r"on (http://\S+)", line)
            if found:
                url = found[1]
                break
        assert url, f"the server ended with {process.wait(5)}"
        deadline = time.monotonic() + timeout
        while True:
            try:
                with urllib.request.urlopen(f"{url}/ready", timeout=5) as reply:
                    if reply.status == 200:
                        break
            except OSError:
                assert process.poll() is None, f"the server ended with {process.returncode}"
                assert time.monotonic() < deadline, "the server did not become ready"
            time.sleep(0.2)
        yield ServeProcess(process, url)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
