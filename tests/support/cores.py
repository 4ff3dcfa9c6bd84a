"""Cores driven by hand, for tests that compare tokens."""

from __future__ import annotations

from headrace.engines.generate import GenerateCore
from headrace.types import Request

__all__ = ["drain"]


def drain(core: GenerateCore, work: list[Request]) -> dict[str, list[int]]:
    """The tokens of all requests; nothing failed, and every block came back."""
    core.add(work)
    tokens: dict[str, list[int]] = {}
    while core.has_work():
        for output in core.step():
            assert not output.error
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    core.scheduler.check()
    assert core.scheduler.pool.account().owned == 0
    return tokens
