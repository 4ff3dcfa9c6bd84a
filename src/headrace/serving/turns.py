"""What one chat turn may hold, decided before it runs: parser, constraint, and what is checked at its end."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from headrace.errors import InvalidRequest
from headrace.execution.constraints.grammar import WHITESPACE
from headrace.llm import AsyncEngine
from headrace.serving.constraints import Constrained
from headrace.serving.parsers.grammar import Format
from headrace.serving.parsers.lark import ToolGrammar, free_strings, writable
from headrace.serving.parsers.machine import Machine, Thinking
from headrace.serving.parsers.turn import Turn
from headrace.serving.tools import ToolWish
from headrace.types import ConstraintSpec

__all__ = ["TurnPlan", "plan_turn"]

_EMBEDDABLE = ("json_object", "json_schema", "choice", "regex")


class TurnPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One request's turns.

    Attributes:
        thinking: how the prompt left it.
        wish: tools.
        arguments: by tool, what its arguments follow.
        enforced: whether the grammar holds calls to their schemas.
        answer: what content follows.
        spec: the constraint that makes all that so; None: nothing to enforce.
        visible: special tokens that the parser must see.
        warnings: what is asked for and not enforced.
    """

    format: Format
    thinking: Thinking
    wish: ToolWish
    arguments: dict[str, Constrained] = {}
    enforced: bool = False
    answer: Constrained | None = None
    spec: ConstraintSpec | None = None
    visible: frozenset[int] = frozenset()
    warnings: tuple[str, ...] = ()

    def turn(self) -> Turn:
        """A fresh turn of one choice."""
        tools = {one.name: one.parameters or {} for one in self.wish.functions}
        calls = self.wish.mode != "none"
        if not calls and self.format.reasoning is None and self.format.channels is None:
            return Turn(None)
        machine = Machine(self.format, tools if calls else None, self.thinking, held=self.enforced)
        short = self.format.tools is not None and self.format.tools.ids == "short"
        return Turn(machine, short_ids=short, parallel=self.wish.parallel)


def plan_turn(
    format: Format,
    thinking: Thinking,
    wish: ToolWish,
    arguments: dict[str, Constrained],
    answer: Constrained | None,
    engine: AsyncEngine,
    *,
    budget: int | None = None,
) -> TurnPlan:
    """Put together what a request wants.

    Args:
        arguments: of `tools.schemas_of`, already found to compile.
        budget: thinking in tokens at most.

    Raises InvalidRequest for combinations that cannot be enforced together.
    """
    tokenizer = engine.kit.tokenizer
    special = tokenizer.special_ids
    ids = {marker: tokenizer.token_to_id(marker) for marker in format.markers}
    known = {marker: number for marker, number in ids.items() if number in special}
    visible = frozenset(number for number in known.values() if number is not None)
    warnings = [text for one in arguments.values() for text in one.warnings]
    warnings += _free_texts(format, wish)
    spec = answer.spec if answer is not None else None
    enforced = False
    grammar = ToolGrammar(format, _schemas(arguments), known.get)
    if wish.mode != "none":
        spec = _with_tools(grammar, wish, answer)
        enforced = spec is not None
    elif answer is not None and format.channels is not None and answer.spec.kind in _EMBEDDABLE:
        spec = ConstraintSpec("lark", grammar.forced(parallel=False, instead=_embedded(answer.spec)))
    head = _head(format, thinking, engine, answer, budget, forced=wish.mode == "forced")
    if spec is None and budget is not None and head:
        spec = ConstraintSpec("text", "")
    if spec is not None and head:
        spec = msgspec.structs.replace(spec, **head)
    return TurnPlan(
        format=format,
        thinking=thinking,
        wish=wish,
        arguments=arguments,
        enforced=enforced,
        answer=answer,
        spec=spec,
        visible=visible,
        warnings=tuple(warnings),
    )


def _schemas(arguments: dict[str, Constrained]) -> dict[str, Any]:
    return {name: json.loads(one.spec.text) for name, one in arguments.items()}


def _free_texts(format: Format, wish: ToolWish) -> list[str]:
    """Limits on texts that a tagged format cannot be held to: refused under strict, else warned of."""
    warnings = []
    for number, one in wish.numbered():
        found = free_strings(format, one.parameters)
        param = f"tools[{number}].function.parameters"
        if not writable(format, one.parameters or {}):
            raise InvalidRequest(
                f"{param} cannot be written in this model's call format, which knows named properties only: "
                "use type object with properties at the root",
                param=param,
                code="unenforced_keyword",
            )
        if found and one.strict:
            raise InvalidRequest(
                f"{param} cannot be enforced strictly in this model's call format: {', '.join(found)}",
                param=param,
                code="unenforced_keyword",
            )
        if found:
            warnings.append(f"{param}: not enforced in this model's call format: {', '.join(found)}")
    return warnings


def _with_tools(grammar: ToolGrammar, wish: ToolWish, answer: Constrained | None) -> ConstraintSpec | None:
    """Calls only; free text with calls; or an answer that follows its own grammar, or calls."""
    if wish.mode == "forced":
        return ConstraintSpec("lark", grammar.forced(parallel=wish.parallel))
    if answer is None:
        lark = grammar.triggered(parallel=wish.parallel)
        return None if lark is None else ConstraintSpec("lark", lark)
    if answer.spec.kind not in _EMBEDDABLE:
        raise InvalidRequest(
            f"{answer.param} of kind {answer.spec.kind!r} cannot be combined with tools that may be called; "
            "set tool_choice to 'none' or 'required'",
            param=answer.param,
        )
    return ConstraintSpec("lark", grammar.forced(parallel=wish.parallel, instead=_embedded(answer.spec)))


def _embedded(spec: ConstraintSpec) -> str:
    """A grammar as an expression within another."""
    if spec.kind == "choice":
        return " | ".join(json.dumps(text, ensure_ascii=False) for text in json.loads(spec.text))
    if spec.kind == "regex":
        return f"%regex {json.dumps(spec.text)}"
    schema = json.loads(spec.text or '{"type": "object"}')
    if isinstance(schema, dict):
        schema["x-guidance"] = {"whitespace_pattern": WHITESPACE} | schema.get("x-guidance", {})
    return f"%json {json.dumps(schema)}"


def _head(
    format: Format,
    thinking: Thinking,
    engine: AsyncEngine,
    answer: Constrained | None,
    budget: int | None,
    *,
    forced: bool,
) -> dict[str, Any]:
    """Fields of a ConstraintSpec for the thinking before what is constrained."""
    tokenizer = engine.kit.tokenizer
    if format.channels is not None:
        if budget is not None:
            raise InvalidRequest(
                "thinking_token_budget is not offered for this model's channels; use reasoning_effort",
                param="thinking_token_budget",
            )
        if forced or answer is None or answer.spec.kind in _EMBEDDABLE:
            return {}  # its grammar holds the channels
        c = format.channels
        return {"free_until": tuple(tokenizer.encode(f"{c.channel}{c.answer}{c.message}", False))}
    reasoning = format.reasoning
    if reasoning is None or thinking == "closed":
        if budget is not None and reasoning is None:
            raise InvalidRequest(
                "thinking_token_budget needs a model that thinks, and this one shows no tags of thinking",
                param="thinking_token_budget",
            )
        return {}
    opening, closing = tokenizer.token_to_id(reasoning.open), tokenizer.token_to_id(reasoning.close)
    is_open = thinking == "open" or reasoning.implicit
    if closing is None or (opening is None and not is_open):
        if is_open or budget is not None:
            raise InvalidRequest(
                f"thinking cannot be told from the answer: {reasoning.close!r} is no single token of this model",
                param=answer.param if answer is not None else "thinking_token_budget",
            )
        return {}
    head: dict[str, Any] = {"free_until": (closing,), "free_tokens": budget}
    return head if is_open else {**head, "free_from": opening}
