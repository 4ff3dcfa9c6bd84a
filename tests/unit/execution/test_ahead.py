"""Kernels compiled ahead: each variant once, by processes that leave nothing, and errors are told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_each_variant_is_compiled_once(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "compile_ahead.py")],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT / "src"),
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # Triton tells apart 1, what 16 divides, and others.
    assert found["count"] == 3
    assert found["sums"] == [0.0] * 6  # nothing ran, and what it would have written reads as zeros
    assert found["before"] == []
    assert found["after"] == ["_add"] * 3
    assert found["told"][0] == [0, 3]
    assert found["told"][-1] == [3, 3]
    assert found["again"] == 0
    assert "a kernel does not compile" in done.stderr
    assert found["error"] == "CompilationError"  # told again by the launch
    assert found["beside_the_bad"] == 4  # the good one beside it was compiled all the same
    assert found["outside"] == 12
    assert found["children"] == 0


@pytest.mark.parametrize("most", [0, 1])
def test_a_limit_of_processes_costs_time_and_no_more(
    most: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    from headrace.kernels import ahead

    fork, made = os.fork, []

    def limited() -> int:
        if len(made) == most:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        pid = fork()
        made.append(pid)
        return pid

    def work(name: str) -> Callable[[], None]:
        return lambda: (tmp_path / name).touch()

    monkeypatch.setattr(os, "fork", limited)
    monkeypatch.setattr(ahead, "_num_cores", lambda: 3)
    before = os.listdir("/proc/self/fd")
    ahead._compile_in_processes([work(name) for name in "abc"], None)
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert sorted(file.name for file in tmp_path.iterdir()) == (["a", "b", "c"] if most else [])
    assert not any(Path(f"/proc/{pid}").exists() for pid in made)


def test_workers_die_with_the_core() -> None:
    pytest.importorskip("triton")
    code = (
        "import os, time\n"
        "from headrace.kernels.ahead import _compile_in_processes\n"
        "def work():\n"
        "    os.write(1, f'{os.getpid()}\\n'.encode())\n"
        "    time.sleep(60)\n"
        "_compile_in_processes([work] * 2, None)\n"
    )
    core = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert core.stdout is not None
    worker = int(core.stdout.readline())
    assert Path(f"/proc/{worker}").exists()
    core.kill()
    core.wait()
    deadline = time.monotonic() + 60
    while (found := _state(worker)) not in ("", "Z") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found in ("", "Z")
    core.stdout.close()


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
