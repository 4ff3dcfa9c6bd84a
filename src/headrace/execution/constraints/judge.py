"""Grammars are first compiled in a child process that can be killed: bounds of time and memory that hold."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from typing import Any

import msgspec

from headrace.errors import InvalidRequest, Overloaded
from headrace.execution.constraints.priority import come_forward, stand_back
from headrace.types import ConstraintSpec, Judged

__all__ = ["Judge"]

_MEMORY_BYTES = 2 << 30
_START_SECONDS = 10.0
_PATIENCE = 5.0
_STARVED_SECONDS = 30.0  # on the clock, for a child that gets no processor
_MOST_DYING = 2  # children that were killed and are not yet gone
_DYING_SECONDS = 1.0
_FELT_SECONDS = 0.025  # of processor time; what takes longer runs when nobody else wants a processor
_PIECE = 1 << 16


class Judge:
    """One child process, one job at a time; started when first needed and after every death.

    Not thread-safe: its owner asks from one thread at a time.

    Args:
        seconds: of processor time that one job may take; on the clock five times as long, and half a minute while all
            processors are taken by others, since the child stands back behind them.
        memory_bytes: address space of the child.
    """

    def __init__(self, *, seconds: float = 2.0, memory_bytes: int = _MEMORY_BYTES) -> None:
        self.seconds = seconds
        self._memory = memory_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._dying: list[subprocess.Popen[bytes]] = []
        self._num_jobs = 0
        self._closed = False

    def check(self, spec: ConstraintSpec) -> Judged:
        """What compiling costs.

        Raises InvalidRequest (``response_format``) when the grammar is not to be enforced, and Overloaded when the
        child got no processor.
        """
        try:
            answer = self._ask({"check": [spec.kind, spec.text]})
        except _Starved:
            raise _too_busy(f"the {spec.kind} cannot be compiled now") from None
        except TimeoutError:
            raise _too_costly(f"the {spec.kind} takes over {self.seconds:g} s to compile") from None
        except (EOFError, OSError):
            raise _too_costly(f"the {spec.kind} takes more memory to compile than allowed") from None
        if isinstance(answer, str):
            raise InvalidRequest(answer, param="response_format", code="invalid_grammar")
        return Judged(*answer)

    def match(self, spec: ConstraintSpec, text: str) -> str:
        """Empty when the text follows the grammar, else how it does not. Raises TimeoutError, EOFError or OSError."""
        return str(self._ask({"match": [spec.kind, spec.text, text]}))

    def enforceable(self, schemas: list[tuple[Any, str, bool]]) -> list[tuple[str, tuple[str, ...]]]:
        """`schema_report.enforceable` of each (schema, param, strict)."""
        try:
            answer = self._ask({"enforceable": schemas})
        except _Starved:
            raise _too_busy("the schema cannot be read now") from None
        except (TimeoutError, EOFError, OSError) as error:
            raise _too_costly(f"the schema cannot be read in {self.seconds:g} s") from error
        if isinstance(answer, dict):
            raise InvalidRequest(answer["message"], param=answer["param"], code=answer["code"])
        return [(text, tuple(warnings)) for text, warnings in answer]

    def close(self) -> None:
        """End the child for good, whatever it does; from any thread."""
        self._closed = True
        self._drop()
        self._bury(0)

    def _drop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            for thread in _threads(process.pid):
                come_forward(thread)
            process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        # To give its memory back it needs a processor, and perhaps it stands back: nobody waits for that.
        self._dying.append(process)

    def _bury(self, most: int) -> None:
        """Wait a moment until so many of the killed are left at most."""
        deadline = time.monotonic() + _DYING_SECONDS
        while len(self._dying) > most and time.monotonic() < deadline:
            time.sleep(0.005)
            self._dying = [process for process in self._dying if process.poll() is None]

    def _ask(self, question: dict[str, Any]) -> Any:
        job = msgspec.json.encode(question) + b"\n"
        while True:
            used = self._num_jobs > 0
            try:
                return json.loads(self._exchange(job))
            except BaseException as error:
                self._drop()  # else its answer would be taken for the next job's
                died = isinstance(error, (EOFError, OSError)) and not isinstance(error, TimeoutError)
                if not died or not used or self._closed:
                    raise
                # It may have died of what it kept of earlier jobs: once more, in a fresh one.
                self._num_jobs = 0

    def _exchange(self, job: bytes) -> bytes:
        if self._process is None or self._process.poll() is not None:
            self._drop()
            self._process = self._start()
            self._num_jobs = 0
            self._talk(self._process, b"", _START_SECONDS)  # it says when it is there
        self._num_jobs += 1
        return self._talk(self._process, job, self.seconds)

    def _talk(self, process: subprocess.Popen[bytes], job: bytes, seconds: float) -> bytes:
        """Write a line, read a line."""
        assert process.stdin is not None and process.stdout is not None
        clock = _Clock(process.pid, seconds, felt=_FELT_SECONDS if job else seconds)
        answer, left = bytearray(), memoryview(job)
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if left:
                selector.register(process.stdin, selectors.EVENT_WRITE)
            while not answer.endswith(b"\n"):
                for key, _ in selector.select(clock.left()):
                    if key.fileobj is process.stdin:
                        left = left[os.write(key.fd, left[:_PIECE]) :]
                        if not left:
                            selector.unregister(process.stdin)
                        continue
                    piece = os.read(key.fd, _PIECE)
                    if not piece:
                        raise EOFError
                    answer += piece
        return bytes(answer)

    def _start(self) -> subprocess.Popen[bytes]:
        if self._closed:
            raise OSError("closed")
        self._bury(_MOST_DYING)
        if len(self._dying) > _MOST_DYING:  # they hold memory
            raise _Starved
        process = subprocess.Popen(
            [sys.executable, "-m", "headrace.execution.constraints.judge_child", str(self._memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        assert process.stdin is not None and process.stdout is not None
        os.set_blocking(process.stdin.fileno(), False)
        return process


def _too_costly(reason: str) -> InvalidRequest:
    return InvalidRequest(f"{reason}; make it smaller", param="response_format", code="costly_grammar")


def _too_busy(reason: str) -> Overloaded:
    return Overloaded(f"{reason}: all processors are busy; try again", retry_after=5.0)


class _Starved(TimeoutError):
    """The child wants to run and gets no processor."""


class _Clock:
    """How long a job may still take: of its process's own time where the system tells, and on the clock.

    Args:
        felt: of processor time; beyond it the job's thread stands back.
    """

    def __init__(self, pid: int, seconds: float, *, felt: float) -> None:
        self._pid = pid
        self._seconds, self._felt = seconds, felt
        self._before = _used(pid)
        self._began = time.monotonic()
        self._stood_back = felt >= seconds

    def left(self) -> float:
        """Seconds until it is worth asking again. Raises TimeoutError when the time is up."""
        used, passed = _used(self._pid) - self._before, time.monotonic() - self._began
        if used >= self._seconds:
            raise TimeoutError
        if not self._stood_back and used >= self._felt:
            for thread in _threads(self._pid):
                stand_back(thread)
            self._stood_back = True
        wait = self._seconds * _PATIENCE - passed
        if wait > 0:
            return min(self._seconds - used if self._stood_back else _FELT_SECONDS, wait)
        if not _wants_to_run(self._pid):
            raise TimeoutError
        if passed > _STARVED_SECONDS:
            raise _Starved
        return _FELT_SECONDS


def _fields(path: str) -> list[str]:
    """Of a stat file of /proc, from the state on; empty where there is none."""
    try:
        with open(path) as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


def _used(pid: int) -> float:
    """Seconds of processor time; 0 where the system does not tell."""
    fields = _fields(f"/proc/{pid}/stat")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def _threads(pid: int) -> list[int]:
    """All but the first, which reads questions and writes answers."""
    try:
        return [int(thread) for thread in os.listdir(f"/proc/{pid}/task") if thread != str(pid)]
    except OSError:
        return []


def _wants_to_run(pid: int) -> bool:
    """Whether a thread runs, waits for a processor or for a disk, instead of for something that may never come."""
    return any(
        _fields(f"/proc/{pid}/task/{thread}/stat")[:1] in (["R"], ["D"]) for thread in (pid, *_threads(pid))
    )
