"""Grammars from requests, judged in child processes with limits of time and memory before an engine sees them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections import OrderedDict

from headrace.errors import EngineError, InvalidRequest
from headrace.types import ConstraintSpec

__all__ = ["GrammarChecker"]

_CACHED = 1024
_LINE = 64 * 2**20  # longest line of either side, bytes
_START_SECONDS = 20.0


class _Child:
    """One process, one job at a time; started when first needed and after every death."""

    def __init__(self, memory_bytes: int) -> None:
        self._memory = memory_bytes
        self._process: asyncio.subprocess.Process | None = None

    async def ask(self, job: bytes, seconds: float) -> str:
        """The answer. Raises TimeoutError or EOFError, after which the process is gone."""
        starting = self._process is None or self._process.returncode is not None
        try:
            if starting:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "headrace.serving.grammar_child",
                    str(self._memory),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.DEVNULL,
                    limit=_LINE,
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                )
            process = self._process
            assert process is not None and process.stdin is not None and process.stdout is not None
            async with asyncio.timeout(seconds + (_START_SECONDS if starting else 0)):
                process.stdin.write(job)
                await process.stdin.drain()
                line = await process.stdout.readline()
            if not line.endswith(b"\n"):
                raise EOFError
            return str(json.loads(line))
        except BaseException:  # also when the caller is cancelled: the answer would be the next one's
            await self.kill()
            raise

    async def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it ended in this moment
                process.kill()
            await process.wait()


class GrammarChecker:
    """Compiles grammars out of harm's way; answers are cached by content.

    Args:
        seconds: that one grammar may take.
        memory_bytes: address space of a child.
        children: grammars judged at the same time; further ones wait.
    """

    def __init__(self, *, seconds: float = 2.0, memory_bytes: int = 2 << 30, children: int = 2) -> None:
        self.seconds = seconds
        self._children = [_Child(memory_bytes) for _ in range(children)]
        self._free: asyncio.Queue[_Child] | None = None
        self._known: OrderedDict[tuple[str, str], str] = OrderedDict()

    async def check(self, spec: ConstraintSpec, param: str) -> None:
        """Raises InvalidRequest (``param``) with the compiler's reason when the grammar cannot be enforced."""
        key = (spec.kind, spec.text)
        reason = self._known.get(key)
        if reason is None:
            try:
                reason = self._known[key] = await self._ask(spec, None)
            except TimeoutError:
                reason = f"the {spec.kind} takes over {self.seconds:g} s to compile; make it smaller"
            except (EOFError, OSError):
                reason = f"the {spec.kind} takes more memory to compile than allowed; make it smaller"
            while len(self._known) > _CACHED:
                self._known.popitem(last=False)
        if reason:
            raise InvalidRequest(reason, param=param, code="invalid_grammar")

    async def match(self, spec: ConstraintSpec, text: str) -> str:
        """Empty when the text follows the grammar, else how it does not. Raises EngineError when that stays open."""
        try:
            return await self._ask(spec, text)
        except (TimeoutError, EOFError, OSError) as error:
            raise EngineError(
                f"the answer could not be checked against the {spec.kind}: {type(error).__name__}"
            ) from error

    async def _ask(self, spec: ConstraintSpec, text: str | None) -> str:
        if self._free is None:
            self._free = asyncio.Queue()
            for child in self._children:
                self._free.put_nowait(child)
        job = json.dumps({"kind": spec.kind, "text": spec.text, "match": text}).encode() + b"\n"
        child = await self._free.get()
        try:
            return await child.ask(job, self.seconds)
        finally:
            self._free.put_nowait(child)

    async def close(self) -> None:
        """End the children."""
        for child in self._children:
            await child.kill()
