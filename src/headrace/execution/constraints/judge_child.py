"""The process that compiles strangers' grammars: one request a line in, one answer a line out.

It can be killed at any moment: by its parent when it takes too long, by the system at its memory limit. Every job has a
thread of its own, which the parent can make stand back for good. Started as
``python -m headrace.execution.constraints.judge_child BYTES``.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import threading
import time
from collections import OrderedDict
from typing import Any

from headrace.errors import InvalidRequest
from headrace.execution.constraints.constraint import reason
from headrace.execution.constraints.grammar import LIMITS, grammar_of
from headrace.execution.constraints.priority import stand_aside
from headrace.execution.constraints.schema_report import enforceable
from headrace.types import ConstraintSpec, Judged

__all__ = ["ByteVocabulary", "Compiler", "main"]

_CACHED = 128
_KEPT_BYTES = 256 << 20  # of compiled grammars; beyond it the oldest go
_MOST_BYTES = 256 << 20  # of one compiled grammar
_STOP, _SPECIAL = 256, 257


class ByteVocabulary:
    """Every byte is a token, 256 ends, and 257 stands for any special token: what llguidance asks of a tokenizer."""

    def __init__(self) -> None:
        self.bos_token_id = None
        self.eos_token_id = _STOP
        self.tokens = [*(bytes([byte]) for byte in range(256)), b"<stop>", b"<special>"]
        self.special_token_ids = [_STOP, _SPECIAL]

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


class Compiler:
    """Compiles grammars over bytes, and checks texts against them."""

    def __init__(self) -> None:
        from llguidance import LLParserLimits, LLTokenizer, TokenizerWrapper

        self._tokenizer = LLTokenizer(TokenizerWrapper(ByteVocabulary()))
        self._limits = LLParserLimits(**LIMITS)
        self._cache: OrderedDict[tuple[str, str], tuple[Any, Judged]] = OrderedDict()

    def check(self, spec: ConstraintSpec) -> Judged:
        """What compiling costs; raises InvalidRequest when the grammar is refused."""
        return self._compiled(spec)[1]

    def match(self, spec: ConstraintSpec, text: str) -> str:
        """Empty, or where the text leaves the grammar. White space in JSON is free."""
        matcher = self._compiled(_any_space(spec))[0].deep_copy()
        data = list(text.encode())
        read = matcher.try_consume_tokens(data)
        if read < len(data):
            return f"it leaves the grammar at byte {read} of {len(data)}"
        return "" if matcher.is_accepting() else "it ends before the grammar is complete"

    def _compiled(self, spec: ConstraintSpec) -> tuple[Any, Judged]:
        key = (spec.kind, spec.text)
        known = self._cache.get(key)
        if known is None:
            known = self._cache[key] = self._compile(spec)
            while len(self._cache) > _CACHED or (
                len(self._cache) > 1 and sum(cost.bytes for _, cost in self._cache.values()) > _KEPT_BYTES
            ):
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return known

    def _compile(self, spec: ConstraintSpec) -> tuple[Any, Judged]:
        from llguidance import LLMatcher

        began, before = time.process_time(), _resident()
        if spec.kind == "lark":  # ids of special tokens are the model's own
            spec = ConstraintSpec("lark", re.sub(r"<\[[0-9]+\]>", f"<[{_SPECIAL}]>", spec.text))
        matcher = LLMatcher(self._tokenizer, grammar_of(spec), log_level=0, limits=self._limits)
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise _refusal(f"the {spec.kind} cannot be enforced: {reason(matcher)}")
        cost = Judged((time.process_time() - began) * 1e3, max(0, _resident() - before))
        if cost.bytes > _MOST_BYTES:
            raise _refusal(
                f"the {spec.kind} takes over {_MOST_BYTES >> 20} MiB when compiled; make it smaller"
            )
        return matcher, cost


def _refusal(message: str) -> InvalidRequest:
    return InvalidRequest(message, param="response_format", code="invalid_grammar")


def _resident() -> int:
    """Bytes of this process in memory."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:  # not Linux: the peak is the next best
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _any_space(spec: ConstraintSpec) -> ConstraintSpec:
    if spec.kind not in ("json_object", "json_schema"):
        return spec
    schema = json.loads(spec.text or '{"type": "object"}')
    if not isinstance(schema, dict):
        return spec
    schema["x-guidance"] = schema.get("x-guidance", {}) | {"whitespace_pattern": r"[ \n\r\t]*"}
    return ConstraintSpec(spec.kind, json.dumps(schema))


def _answer(compiler: Compiler, question: dict[str, Any]) -> Any:
    """``check``: what it costs, or why not; ``match``: how not; ``enforceable``: texts and warnings, or an error."""
    ((what, given),) = question.items()
    try:
        if what == "check":
            cost = compiler.check(ConstraintSpec(*given))
            return (cost.cpu_ms, cost.bytes)
        if what == "match":
            return compiler.match(ConstraintSpec(*given[:2]), given[2])
        return [enforceable(schema, param, strict=strict) for schema, param, strict in given]
    except InvalidRequest as error:
        if what == "enforceable":
            return {"message": error.message, "param": error.param, "code": error.code}
        return error.message


def _work(compiler: Compiler, line: str, answers: list[str]) -> None:
    stand_aside()
    try:
        answers.append(json.dumps(_answer(compiler, json.loads(line))))
    except BaseException:  # out of memory, say: the parent starts another
        os._exit(1)


def main() -> None:
    """Serve until the input ends."""
    if len(sys.argv) > 1:
        limit = int(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    compiler = Compiler()
    print("true", flush=True)  # ready
    for line in sys.stdin:
        answers: list[str] = []
        thread = threading.Thread(target=_work, args=(compiler, line, answers), daemon=True)
        thread.start()
        thread.join()
        print(answers[0], flush=True)


if __name__ == "__main__":
    main()
