"""The process that compiles strangers' grammars: one request a line in, one answer a line out.

It can be killed at any moment: by its parent when it takes too long, by the system at its memory limit. Run as
``python -m headrace.serving.grammar_child BYTES``.
"""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from typing import Any

from headrace.errors import InvalidRequest
from headrace.execution.constraints.grammar import LIMITS, grammar_of
from headrace.types import ConstraintSpec

__all__ = ["ByteVocabulary", "Compiler", "main"]

_CACHED = 128
_STOP = 256


class ByteVocabulary:
    """Every byte is a token, and 256 ends: what llguidance asks of a tokenizer."""

    def __init__(self) -> None:
        self.bos_token_id = None
        self.eos_token_id = _STOP
        self.tokens = [*(bytes([byte]) for byte in range(256)), b"<stop>"]
        self.special_token_ids = [_STOP]

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


class Compiler:
    """Compiles grammars over bytes, and checks texts against them."""

    def __init__(self) -> None:
        from llguidance import LLParserLimits, LLTokenizer, TokenizerWrapper

        self._tokenizer = LLTokenizer(TokenizerWrapper(ByteVocabulary()))
        self._limits = LLParserLimits(**LIMITS)
        self._cache: OrderedDict[tuple[str, str], Any] = OrderedDict()

    def check(self, spec: ConstraintSpec) -> str:
        """Empty, or why the grammar is refused."""
        try:
            self._matcher(spec)
        except InvalidRequest as error:
            return error.message
        return ""

    def match(self, spec: ConstraintSpec, text: str) -> str:
        """Empty, or where the text leaves the grammar. White space in JSON is free."""
        matcher = self._matcher(_any_space(spec)).deep_copy()
        data = list(text.encode())
        read = matcher.try_consume_tokens(data)
        if read < len(data):
            return f"it leaves the grammar at byte {read} of {len(data)}"
        return "" if matcher.is_accepting() else "it ends before the grammar is complete"

    def _matcher(self, spec: ConstraintSpec) -> Any:
        from llguidance import LLMatcher

        key = (spec.kind, spec.text)
        known = self._cache.get(key)
        if known is None:
            known = LLMatcher(self._tokenizer, grammar_of(spec), log_level=0, limits=self._limits)
            if not known.is_error():
                known.deep_copy().compute_bitmask()
            if known.is_error():
                reason = known.get_error().strip()
                raise InvalidRequest(f"the {spec.kind} cannot be enforced: {reason}", param="response_format")
            self._cache[key] = known
            while len(self._cache) > _CACHED:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return known


def _any_space(spec: ConstraintSpec) -> ConstraintSpec:
    if spec.kind not in ("json_object", "json_schema"):
        return spec
    schema = json.loads(spec.text or '{"type": "object"}')
    if not isinstance(schema, dict):
        return spec
    schema["x-guidance"] = schema.get("x-guidance", {}) | {"whitespace_pattern": r"[ \n\r\t]*"}
    return ConstraintSpec(spec.kind, json.dumps(schema))


def main() -> None:
    """Serve until the input ends."""
    import resource

    if len(sys.argv) > 1:
        limit = int(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    compiler = Compiler()
    for line in sys.stdin:
        job = json.loads(line)
        spec = ConstraintSpec(job["kind"], job["text"])
        answer = compiler.check(spec) if job["match"] is None else compiler.match(spec, job["match"])
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
