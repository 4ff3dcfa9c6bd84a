"""The words that formats are declared in. A declaration is read by `machine.Machine` and written by `lark`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "Arguments",
    "CallObject",
    "Channels",
    "Format",
    "GemmaArguments",
    "Lit",
    "Name",
    "Params",
    "PythonCall",
    "Reasoning",
    "Section",
    "Step",
    "ToolFormat",
]


@dataclass(frozen=True, slots=True)
class Lit:
    """A marker that must stand here; ``optional``: may. ``before``: what a constrained model writes before it."""

    text: str
    optional: bool = False
    before: str = ""


@dataclass(frozen=True, slots=True)
class Name:
    """The function's name, up to one of ``until``.

    Attributes:
        until: what ends it; the first is what a constrained model writes.
        keep: leave that text in place, for the next step to read.
        before, after: what a constrained model writes before and after that text.
        numbered: ``functions.NAME:3``: the whole is the call's id as well.
        id_mark: may follow, and then the call's id.
    """

    until: tuple[str, ...]
    keep: tuple[str, ...] = ()
    before: str = ""
    after: str = ""
    numbered: bool = False
    id_mark: str = ""


@dataclass(frozen=True, slots=True)
class Arguments:
    """A JSON object, handed on as it comes."""


@dataclass(frozen=True, slots=True)
class CallObject:
    """A JSON object that holds name and arguments, in any order; other keys are left out."""

    name: tuple[str, ...] = ("name",)
    arguments: tuple[str, ...] = ("arguments", "parameters")


@dataclass(frozen=True, slots=True)
class Params:
    """Arguments one by one as tagged text, typed by the tool's schema.

    Attributes:
        open, key_end, value_open, close: what stands before, between and after key and value.
        pad: line breaks that stand around a value and do not belong to it.
    """

    open: str
    key_end: str
    close: str
    value_open: str = ""
    pad: str = ""


@dataclass(frozen=True, slots=True)
class PythonCall:
    """``name(key=literal, ...)`` in Python's syntax."""


@dataclass(frozen=True, slots=True)
class GemmaArguments:
    """``{key:value}`` without quotes around keys, and ``quote`` around texts."""

    quote: str


Step = Lit | Name | Arguments | CallObject | Params | PythonCall | GemmaArguments


@dataclass(frozen=True, slots=True)
class Section:
    """Calls between markers.

    Attributes:
        open: markers that begin it, any of them; the first is what a constrained model writes. Empty: see bare.
        call: steps of one call; white space between steps does not matter.
        close: marker at its end; ``close_optional``: may be missing.
        listed: calls stand in ``[`` and ``]`` with commas between; a single one may stand without.
        many: several calls in a row.
        separator: may stand between calls.
        bare: the section may begin a turn without a marker, if a call of a known tool is there.
    """

    open: tuple[str, ...]
    call: tuple[Step, ...]
    close: str = ""
    close_optional: bool = False
    listed: bool = False
    many: bool = False
    separator: str = ""
    bare: bool = False


@dataclass(frozen=True, slots=True)
class Channels:
    """Harmony: every piece of text has a header that says what it is (openai/harmony)."""

    start: str = "<|start|>"
    channel: str = "<|channel|>"
    constrain: str = "<|constrain|>"
    message: str = "<|message|>"
    ends: tuple[str, ...] = ("<|end|>", "<|return|>", "<|call|>")
    thinking: str = "analysis"
    answer: str = "final"


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Thinking between tags at the start of a turn.

    Attributes:
        implicit: without an opening tag in prompt or text, the turn begins with thinking all the same.
        ended_by_calls: a section's marker ends thinking too.
    """

    name: str
    open: str
    close: str
    implicit: bool = False
    ended_by_calls: bool = False


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family of models writes calls.

    Attributes:
        ids: ``openai``: call_ and hex; ``short``: nine letters and digits, as Mistral's templates ask.
    """

    name: str
    section: Section
    ids: Literal["openai", "short"] = "openai"


@dataclass(frozen=True, slots=True)
class Format:
    """All that is special in a model's text."""

    tools: ToolFormat | None = None
    reasoning: Reasoning | None = None
    channels: Channels | None = None

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that must reach the parser even where the vocabulary calls them special."""
        found: list[str] = []
        if self.channels is not None:
            c = self.channels
            found += [c.start, c.channel, c.constrain, c.message, *c.ends]
        if self.reasoning is not None:
            found += [self.reasoning.open, self.reasoning.close]
        if self.tools is not None:
            section = self.tools.section
            found += [*section.open, section.close, *(text for step in section.call for text in _texts(step))]
        return tuple(dict.fromkeys(text for text in found if text))


def _texts(step: Step) -> tuple[str, ...]:
    if isinstance(step, Lit):
        return (step.text,)
    if isinstance(step, Name):
        return (*step.until, *step.keep, step.id_mark)
    if isinstance(step, Params):
        return (step.open, step.key_end, step.value_open, step.close)
    return (step.quote,) if isinstance(step, GemmaArguments) else ()
