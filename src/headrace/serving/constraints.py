"""The one place where request fields become a ConstraintSpec for the engine.

In this version no constraint is offered: what asks for one is refused by name, never ignored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headrace.errors import InvalidRequest, nearest
from headrace.types import ConstraintSpec

if TYPE_CHECKING:
    from headrace.serving.openai.common import GenerateFields

__all__ = ["check_tool_choice", "constraint_of"]

_FORMATS = ("text", "json_object", "json_schema", "grammar", "structural_tag")


def constraint_of(body: GenerateFields) -> ConstraintSpec | None:
    """The grammar that a request asks for; None: free text. Raises InvalidRequest for what is not offered."""
    given = body.response_format
    if given is None:
        return None
    kind = given.get("type")
    if not isinstance(kind, str) or kind not in _FORMATS:
        raise InvalidRequest(
            f"response_format.type is {kind!r}; expected one of {', '.join(_FORMATS)}"
            f"{nearest(str(kind), _FORMATS)}",
            param="response_format.type",
        )
    if kind != "text":
        raise InvalidRequest(
            f"response_format of type {kind!r} is not supported in this version: the output cannot be "
            "constrained to it; use type 'text'",
            param="response_format",
            code="unsupported_value",
        )
    return None


def check_tool_choice(choice: str | dict[str, Any] | None, param: str) -> None:
    """Refuse a choice of tools that would need a constraint, and what is no choice at all."""
    if choice is None or choice in ("auto", "none"):
        return
    if choice == "required" or isinstance(choice, dict):
        raise InvalidRequest(
            f"{param} can be 'auto' or 'none' in this version: the output cannot be forced into a tool call",
            param=param,
            code="unsupported_value",
        )
    raise InvalidRequest(
        f"{param} is {choice!r}; expected 'auto', 'none', 'required' or a named tool", param=param
    )
