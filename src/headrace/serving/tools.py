"""Tools of a chat request: which may be called, which must, and what their arguments follow."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from headrace.errors import InvalidRequest
from headrace.serving.constraints import Constrained
from headrace.serving.grammars import GrammarChecker
from headrace.types import ConstraintSpec

if TYPE_CHECKING:
    from headrace.serving.openai.schemas import ChatRequest, FunctionTool

__all__ = ["ToolWish", "describe", "schemas_of", "tool_wish"]

_NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}


class ToolWish(msgspec.Struct, frozen=True):
    """What a request says about tools.

    Attributes:
        mode: ``auto``: calls if the model likes; ``forced``: nothing but calls; ``none``.
        functions: those that may be called.
        all: those that the model is told of.
        parallel: several calls in one turn; a named function is called once.
    """

    mode: Literal["none", "auto", "forced"]
    functions: tuple[FunctionTool, ...] = ()
    all: tuple[FunctionTool, ...] = ()
    parallel: bool = True

    def numbered(self) -> Iterator[tuple[int, FunctionTool]]:
        """Those that may be called, with their place among all."""
        callable_ = {one.name for one in self.functions}
        return ((number, one) for number, one in enumerate(self.all) if one.name in callable_)

    def for_template(self) -> list[dict[str, Any]] | None:
        """The tools as chat templates expect them."""
        return [
            {"type": "function", "function": one.model_dump(exclude_none=True)} for one in self.all
        ] or None


def tool_wish(body: ChatRequest) -> ToolWish:
    """Read tools, tool_choice and their old forms; raises InvalidRequest naming the field."""
    old = body.functions is not None or body.function_call is not None
    choice, param = (body.function_call, "function_call") if old else (body.tool_choice, "tool_choice")
    given = tuple(body.functions or ()) if old else tuple(tool.function for tool in body.tools or ())
    names = [one.name for one in given]
    if len(set(names)) < len(names):
        raise InvalidRequest("two tools have the same name", param="functions" if old else "tools")
    mode, wanted = _choice(choice, param)
    if not given:
        if choice is not None and mode != "none":
            raise InvalidRequest(f"{param} is given without tools", param=param)
        return ToolWish("none")
    if mode == "none":
        return ToolWish("none")
    missing = [name for name in wanted or () if name not in names]
    if missing:
        raise InvalidRequest(
            f"{param} names {missing[0][:80]!r}, which is not among the tools ({', '.join(names)})",
            param=param,
        )
    functions = tuple(one for one in given if wanted is None or one.name in wanted)
    named = mode == "forced" and isinstance(choice, dict) and choice.get("type") != "allowed_tools"
    return ToolWish(mode, functions, given, body.parallel_tool_calls is not False and not named)


def _choice(given: Any, param: str) -> tuple[Literal["none", "auto", "forced"], Sequence[str] | None]:
    """(mode, names of the tools that may be called; None: all)."""
    match given:
        case None | "auto":
            return "auto", None
        case "none":
            return "none", None
        case "required":
            return "forced", None
        case {"type": "function", "function": {"name": str(name)}} | {"type": "function", "name": str(name)}:
            return "forced", [name]
        case {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "auto" | "required" as mode, "tools": [*tools]},
        }:
            names = [_name(tool, param) for tool in tools]
            return ("auto" if mode == "auto" else "forced"), names
        case {"name": str(name), **rest} if not rest and param == "function_call":
            return "forced", [name]
    raise InvalidRequest(
        f"{param} is {json.dumps(given)[:80]}; expected 'auto', 'none', 'required' or "
        '{"type": "function", "function": {"name": ...}}',
        param=param,
    )


def _name(tool: Any, param: str) -> str:
    match tool:
        case {"function": {"name": str(name)}} | {"name": str(name)}:
            return name
    raise InvalidRequest(f"{param} holds a tool without a name", param=param)


async def schemas_of(wish: ToolWish, checker: GrammarChecker) -> dict[str, Constrained]:
    """What the arguments of each tool that may be called follow. ``strict`` refuses what is not enforced."""
    asked = []
    for number, one in wish.numbered() if wish.mode != "none" else ():
        schema = one.parameters or _NOTHING
        if not {"type", "$ref", "anyOf", "allOf", "oneOf"} & schema.keys():
            schema = {"type": "object", **schema}
        kind = schema.get("type", "object")
        if kind != "object" and kind != ["object"]:
            raise InvalidRequest(
                f"tools[{number}].function.parameters is of type {json.dumps(kind)[:60]}; arguments are an object",
                param=f"tools[{number}].function.parameters",
            )
        asked.append((one.name, (schema, f"tools[{number}].function.parameters", bool(one.strict))))
    answers = await checker.enforceable([question for _, question in asked])
    return {
        name: Constrained(ConstraintSpec("json_schema", text), param, warnings)
        for (name, (_, param, _)), (text, warnings) in zip(asked, answers)
    }


# --- models whose template knows no tools ------------------------------------------------------------


def describe(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Messages that tell of tools in words, in the format of Hermes, for templates that leave tools out.

    Calls of the assistant become text, and results messages of the user.
    """
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = (
        "You may call one or more functions to help with the user's request. Their signatures:\n"
        f"<tools>\n{listed}\n</tools>\nFor each call answer with a JSON object in tags:\n"
        '<tool_call>\n{"name": FUNCTION, "arguments": {...}}\n</tool_call>'
    )
    found = [_spoken(message) for message in messages]
    if found and found[0].get("role") in ("system", "developer") and isinstance(found[0].get("content"), str):
        found[0]["content"] += "\n\n" + text
        return found
    return [{"role": "system", "content": text}, *found]


def _spoken(message: Mapping[str, Any]) -> dict[str, Any]:
    copy = dict(message)
    calls = copy.pop("tool_calls", None)
    if calls:
        lines = [copy["content"]] if copy.get("content") else []
        for call in calls:
            function = call["function"]
            arguments = function.get("arguments") or "{}"
            shown = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            lines.append(
                f'<tool_call>\n{{"name": {json.dumps(function["name"])}, "arguments": {shown}}}\n</tool_call>'
            )
        copy["content"] = "\n".join(lines)
    if copy.get("role") == "tool":
        copy = {"role": "user", "content": f"<tool_response>\n{copy.get('content')}\n</tool_response>"}
    return copy
