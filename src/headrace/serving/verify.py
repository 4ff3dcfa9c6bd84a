"""The last look at a constrained turn, by a second matcher in another process, before it is called finished."""

from __future__ import annotations

from collections.abc import AsyncIterator

from headrace.errors import EngineError
from headrace.llm import Completion, Delta
from headrace.serving.constraints import Constrained
from headrace.serving.exchange import current
from headrace.serving.grammars import GrammarChecker
from headrace.serving.parsers.turn import Call, Turn
from headrace.serving.turns import TurnPlan
from headrace.types import FinishReason

__all__ = ["Verifier"]


class Verifier:
    """Looks at the turns of one request.

    Args:
        wanted: what content must follow; None: anything is right.
        plan: of a chat: its tools.

    Warnings go to the current exchange, which the reply and its headers tell.
    """

    def __init__(
        self, checker: GrammarChecker, wanted: Constrained | None, plan: TurnPlan | None = None
    ) -> None:
        self._checker = checker
        self._wanted = wanted
        self._plan = plan
        current().warnings += wanted.warnings if wanted is not None else ()
        current().warnings += plan.warnings if plan is not None else ()

    async def look(self, turn: Turn, done: Delta | Completion) -> None:
        """Judge a turn that ends with ``stop``; one cut short says ``length`` and is not judged.

        What a stop string cut, or what nothing held to its schema, gets a warning. Raises EngineError for any other
        turn that does not follow.
        """
        if done.finish_reason is not FinishReason.STOP:
            return
        if turn.dropped:
            self._warn(f"choice {done.index}: {turn.dropped} calls left out (parallel_tool_calls is false)")
        async for problem, enforced in self._problems(turn):
            if enforced and done.stop_reason is None:
                raise EngineError(f"the answer does not follow {problem}", code="constraint_violated")
            cut = " was cut by a stop and" if done.stop_reason is not None else ""
            self._warn(f"choice {done.index}{cut} does not follow {problem}")

    def _warn(self, text: str) -> None:
        current().warnings += (text,)

    async def _problems(self, turn: Turn) -> AsyncIterator[tuple[str, bool]]:
        """(what is not followed and how, whether it had to be)."""
        plan = self._plan
        for call in turn.calls:
            assert plan is not None
            problem = await self._arguments(call, plan)
            if problem:
                strict = any(one.strict for one in plan.wish.functions if one.name == call.name)
                yield problem, plan.enforced or strict
        if turn.calls:
            return
        if plan is not None and plan.wish.mode == "forced":
            yield "tool_choice: no tool was called", True
        elif self._wanted is not None:
            problem = await self._checker.match(self._wanted.spec, turn.content)
            if problem:
                yield f"{self._wanted.param}: {problem}", True

    async def _arguments(self, call: Call, plan: TurnPlan) -> str:
        """Empty, or what is wrong with a call."""
        wanted = plan.arguments.get(call.name)
        if wanted is None:
            return f"tools: {call.name!r} is none of those that may be called"
        if not call.whole:
            return f"{wanted.param}: the arguments of {call.name!r} are no whole JSON object"
        problem = await self._checker.match(wanted.spec, call.arguments)
        return f"{wanted.param}: in the arguments of {call.name!r}: {problem}" if problem else ""
