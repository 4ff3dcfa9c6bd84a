"""The core's process before it knows what it will run: it never outlives who started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headrace.config.spec import EngineSpec
from headrace.engines.child import CoreChild
from headrace.engines.stages import Stages, process_began

SPEC = EngineSpec(model="none", device="cpu", environment=(("HEADRACE_TEST_ONLY", "7"),))


def gone(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_without_a_spec_it_can_be_ended_at_any_time() -> None:
    child = CoreChild(SPEC)
    environment = Path(f"/proc/{child.pid}/environ")
    assert child.exit_code is None
    deadline = time.monotonic() + 60
    while b"HEADRACE_TEST_ONLY=7" not in environment.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.01)  # until it is another program
    assert b"HEADRACE_TEST_ONLY=7" in environment.read_bytes()
    child.end()
    assert child.exit_code == -signal.SIGKILL
    child.end()


@pytest.mark.parametrize("told", [False, True], ids=["waiting", "told"])
def test_it_ends_when_its_parent_is_killed(told: bool, tmp_path: Path) -> None:
    socket = tmp_path / "socket"
    code = (
        "import time\n"
        "from headrace.config.spec import EngineSpec\n"
        "from headrace.engines.child import CoreChild\n"
        "spec = EngineSpec(model='none', device='cpu')\n"
        "child = CoreChild(spec)\n"
        + (f"child.give(spec, 'ipc://{socket}')\n" if told else "")
        + "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    try:
        deadline = time.monotonic() + (100 if told else 0.5)
        while not socket.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert socket.exists() == told
        parent.kill()
        parent.wait()
        assert gone(pid, 60)
        assert not socket.exists()
    finally:
        parent.kill()
        parent.stdout.close()
        if not gone(pid, 0):
            os.kill(pid, signal.SIGKILL)


def test_it_ends_when_its_parent_was_gone_before_it_looked() -> None:
    """Its standard input stays open, so that only the missing parent can end it."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    child = subprocess.Popen(
        [sys.executable, "-m", "headrace.engines.core_process", "cpu", str(dead.pid)],
        stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert child.wait(120) == 1
    finally:
        child.kill()
        assert child.stdin is not None
        child.stdin.close()


def test_parts_add_up() -> None:
    began = time.time() - 2
    stages = Stages(began)
    before = time.time()
    stages.done("imports")
    after = time.time()
    time.sleep(0.02)
    stages.done("weights")
    least = time.time()
    stages.done("weights")
    most = time.time()
    assert list(stages.seconds) == ["imports", "weights"]
    slack = 0.005  # each part is rounded
    assert least - began - slack <= sum(stages.seconds.values()) <= most - began + slack
    assert before - began - slack <= stages.seconds["imports"] <= after - began + slack
    assert 0 <= time.time() - process_began() < 3600
