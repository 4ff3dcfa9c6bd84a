"""Grammars from requests, judged in child processes with limits of time and memory before an engine sees them."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, TypeVar

import msgspec

from headrace.errors import EngineError, InvalidRequest
from headrace.execution.constraints.judge import Judge
from headrace.execution.constraints.schema_report import enforceable
from headrace.types import ConstraintSpec, Judged

__all__ = ["GrammarChecker"]

T = TypeVar("T")
_CACHED = 1024
_READ_HERE = 8192  # bytes of schemas; a millisecond's work


class GrammarChecker:
    """Compiles grammars out of harm's way; answers are cached by content.

    Args:
        seconds: that one grammar may take.
        memory_bytes: address space of a child.
        children: grammars judged at the same time; further ones wait.
    """

    def __init__(self, *, seconds: float = 2.0, memory_bytes: int = 2 << 30, children: int = 2) -> None:
        self._judges = [Judge(seconds=seconds, memory_bytes=memory_bytes) for _ in range(children)]
        self._free: SimpleQueue[Judge] = SimpleQueue()
        for judge in self._judges:
            self._free.put(judge)
        self._threads = ThreadPoolExecutor(children, "headrace-judge")
        self._read: OrderedDict[tuple[bytes, str, bool], tuple[str, tuple[str, ...]]] = OrderedDict()
        self._known: OrderedDict[tuple[str, str], Judged | str] = OrderedDict()

    async def check(self, spec: ConstraintSpec, param: str) -> ConstraintSpec:
        """The spec with what it costs.

        Raises InvalidRequest (``param``) with the compiler's reason when the grammar cannot be enforced.
        """
        key = (spec.kind, spec.text)
        known = self._known.get(key)
        if known is None:
            try:
                known = await self._ask(lambda judge: judge.check(spec))
            except InvalidRequest as error:
                if error.code == "costly_grammar":  # perhaps only today
                    raise InvalidRequest(error.message, param=param, code=error.code) from error
                known = error.message
            self._known[key] = known
            while len(self._known) > _CACHED:
                self._known.popitem(last=False)
        if isinstance(known, str):
            raise InvalidRequest(known, param=param, code="invalid_grammar")
        return msgspec.structs.replace(spec, judged=known)

    async def enforceable(self, schemas: list[tuple[Any, str, bool]]) -> list[tuple[str, tuple[str, ...]]]:
        """`schema_report.enforceable` of each (schema, param, strict); large ones are read in a child as well."""
        if not schemas:
            return []
        texts = [msgspec.json.encode(schema) for schema, _, _ in schemas]
        if sum(map(len, texts)) <= _READ_HERE:
            return [enforceable(schema, param, strict=strict) for schema, param, strict in schemas]
        keys = [(text, param, strict) for text, (_, param, strict) in zip(texts, schemas)]
        missing = [i for i, key in enumerate(keys) if key not in self._read]
        found = {key: self._read[key] for key in keys if key in self._read}
        if missing:
            asked = [(msgspec.Raw(texts[i]), *schemas[i][1:]) for i in missing]
            for i, answer in zip(missing, await self._ask(lambda judge: judge.enforceable(asked))):
                self._read[keys[i]] = found[keys[i]] = answer
        while len(self._read) > _CACHED:
            self._read.popitem(last=False)
        return [found[key] for key in keys]

    async def match(self, spec: ConstraintSpec, text: str) -> str:
        """Empty when the text follows the grammar, else how it does not. Raises EngineError when that stays open."""
        try:
            return await self._ask(lambda judge: judge.match(spec, text))
        except (TimeoutError, EOFError, OSError) as error:
            raise EngineError(
                f"the answer could not be checked against the {spec.kind}: {type(error).__name__}"
            ) from error

    async def _ask(self, job: Callable[[Judge], T]) -> T:
        def work() -> T:
            judge = self._free.get()
            try:
                return job(judge)
            finally:
                self._free.put(judge)

        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def close(self) -> None:
        """End the children."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for judge in self._judges:
            judge.close()
