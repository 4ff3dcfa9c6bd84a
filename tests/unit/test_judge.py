"""The child that judges grammars: when it stands back, and when its parent gives it up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from subprocess import PIPE

import pytest

from headrace.errors import Overloaded
from headrace.execution.constraints import judge
from headrace.execution.constraints.judge import Judge
from headrace.types import ConstraintSpec


@pytest.mark.skipif(sys.platform != "linux", reason="policies of threads are Linux's")
def test_a_long_job_stands_back_and_the_next_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Light grammars get a processor when the machine is full; heavy ones when it is not."""
    words = {f"k{i}": {"enum": [f"v{i}-{m}" for m in range(40)]} for i in range(500)}
    heavy = ConstraintSpec("json_schema", json.dumps({"type": "object", "properties": words}))
    monkeypatch.setattr(judge, "_STARVED_SECONDS", 600.0)  # whatever else runs here
    one = Judge()
    one.check(ConstraintSpec("regex", "a+"))
    assert one._process is not None
    pid, seen = one._process.pid, set()
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(one.check, heavy)
        while not job.done():
            for thread in set(os.listdir(f"/proc/{pid}/task")) - {str(pid)}:
                with suppress(ProcessLookupError):
                    seen.add(os.sched_getscheduler(int(thread)))
    assert job.result().cpu_ms > 25
    assert os.SCHED_IDLE in seen
    assert os.sched_getscheduler(pid) == os.SCHED_OTHER  # which starts the next job's thread
    one.check(ConstraintSpec("regex", "b+"))
    assert one._process.pid == pid
    one.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_who_gets_no_processor_is_not_taken_for_one_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "_used", lambda pid: 0.0)  # as if it had not run at all
    for code, error in (("while True: pass", judge._Starved), ("input()", TimeoutError)):
        monkeypatch.setattr(judge, "_STARVED_SECONDS", 60.0)
        process = subprocess.Popen(
            [sys.executable, "-c", f"print(flush=True)\n{code}"], stdin=PIPE, stdout=PIPE
        )
        assert process.stdout is not None and process.stdout.readline()
        while judge._wants_to_run(process.pid) != (error is judge._Starved):
            time.sleep(0.01)
        clock = judge._Clock(process.pid, 0.1, felt=0.1)
        clock._began -= 1.0  # longer than such a child may sleep
        if error is judge._Starved:
            assert clock.left() > 0
            monkeypatch.setattr(judge, "_STARVED_SECONDS", 0.5)
        with pytest.raises(TimeoutError) as caught:
            clock.left()
        assert caught.type is error
        process.kill()
        process.communicate()


def test_a_machine_that_is_full_is_not_the_grammars_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def starve(*_: object) -> None:
        raise judge._Starved

    one = Judge()
    monkeypatch.setattr(one, "_ask", starve)
    for ask in (lambda: one.check(ConstraintSpec("regex", "a+")), lambda: one.enforceable([({}, "p", True)])):
        with pytest.raises(Overloaded, match="all processors are busy"):
            ask()
