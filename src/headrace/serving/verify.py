"""The last look at a constrained answer, by a second matcher in another process, before it is called finished."""

from __future__ import annotations

from headrace.errors import EngineError
from headrace.llm import Completion, Delta
from headrace.serving.constraints import Constrained
from headrace.serving.exchange import current
from headrace.serving.grammars import GrammarChecker
from headrace.types import FinishReason

__all__ = ["Verifier"]


class Verifier:
    """Looks at the answers of one request.

    Args:
        wanted: what they must follow; None: anything is right.

    Attributes:
        warned: whether it added a warning to the reply.
    """

    def __init__(self, checker: GrammarChecker, wanted: Constrained | None) -> None:
        self._checker = checker
        self._wanted = wanted
        self.warned = False
        if wanted is not None:
            current().warnings += wanted.warnings

    async def look(self, text: str, done: Delta | Completion) -> None:
        """Judge an answer that ends with ``stop``; one cut short says ``length`` and is not judged.

        An answer that a stop string cut gets a warning. Raises EngineError for any other that does not follow.
        """
        if self._wanted is None or done.finish_reason is not FinishReason.STOP:
            return
        problem = await self._checker.match(self._wanted.spec, text)
        if not problem:
            return
        if done.stop_reason is None:
            raise EngineError(
                f"the answer does not follow {self._wanted.param}: {problem}", code="constraint_violated"
            )
        self.warned = True
        current().warnings += (f"{self._wanted.param}: choice {done.index} was cut by a stop: {problem}",)
