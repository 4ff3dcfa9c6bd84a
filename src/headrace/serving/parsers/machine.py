"""Reads a turn by its format's declaration."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from headrace.serving.parsers.events import CallArguments, CallEnd, CallStart, Content, Event, Thought
from headrace.serving.parsers.grammar import (
    Arguments,
    CallObject,
    Channels,
    Format,
    GemmaArguments,
    Lit,
    Name,
    Params,
    PythonCall,
    Reasoning,
    Section,
    Step,
)
from headrace.serving.parsers.lark import root_of
from headrace.serving.parsers.reader import Reader, Reading, Unfit
from headrace.serving.parsers.values import gemma_arguments, python_arguments, typed

__all__ = ["Machine", "Thinking"]

Thinking = Literal["open", "closed", "maybe"]
_NAME = re.compile(r"[A-Za-z0-9_.\-:/]")
_LONGEST_NAME = 256
_RECIPIENT = re.compile(r"\bto=functions\.([^\s<]+)")


class Machine:
    """One turn of one choice. Feed it text in any pieces: what it finds, joined, is always the same.

    Args:
        format: what is special in this model's text.
        tools: name -> JSON schema of its parameters; None: calls are not looked for.
        thinking: how the prompt left it: ``open`` (its opening tag is there), ``closed`` (none follows) or
            ``maybe`` (the text says).
        held: a grammar holds the model to calls after a marker, so that a piece of one at the end was cut off.
    """

    def __init__(
        self,
        format: Format,
        tools: Mapping[str, Any] | None = None,
        thinking: Thinking = "maybe",
        *,
        held: bool = False,
    ) -> None:
        self._format = format
        self._tools = tools
        self._thinking = thinking
        self._held = held
        self._reader = Reader()
        self._events: list[Event] = []
        self._space = ""  # white space that is dropped if a call follows
        self._fresh = False  # drop white space that comes next
        self._bare = False
        self._running = self._channels(format.channels) if format.channels else self._turn()
        next(self._running)

    def feed(self, text: str) -> list[Event]:
        """What this piece makes certain."""
        if text:
            self._reader.add(text)
            self._advance()
        return self._taken()

    def finish(self) -> list[Event]:
        """What was held back."""
        self._reader.end()
        self._advance()
        return self._taken()

    def _advance(self) -> None:
        next(self._running, None)

    def _taken(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    # --- text ------------------------------------------------------------------------------------

    def _turn(self) -> Reading[None]:
        yield from self._wait()
        reasoning = self._format.reasoning
        if reasoning is not None and self._thinking != "closed":
            yield from self._reason(reasoning)
        if self._format.tools is None or self._tools is None:
            yield from self._reader.until((), self._content)
        else:
            yield from self._free(self._format.tools.section)
        self._flush()

    def _wait(self) -> Reading[None]:
        yield  # the first text comes after the machine is made

    def _content(self, text: str) -> None:
        """Text of the answer; white space at its end waits for what comes next."""
        if self._fresh:
            text = text.lstrip()
            if not text:
                return
            self._fresh = False
        text = self._space + text
        kept = text.rstrip()
        self._space = text[len(kept) :]
        if kept:
            self._events.append(Content(kept))

    def _flush(self) -> None:
        if self._space:
            self._events.append(Content(self._space))
            self._space = ""

    def _thought(self, text: str) -> None:
        text = self._space + text
        kept = text.rstrip()
        self._space = text[len(kept) :]
        if kept:
            self._events.append(Thought(kept))

    def _reason(self, reasoning: Reasoning) -> Reading[None]:
        reader = self._reader
        reader.kept = []
        yield from reader.space()
        opened = yield from reader.literal(reasoning.open)
        before, reader.kept = "".join(reader.kept), None
        if not opened and self._thinking != "open" and not reasoning.implicit:
            self._content(before)
            return
        if opened:
            yield from reader.space()
        tools = self._format.tools
        ends = [reasoning.close]
        if reasoning.ended_by_calls and tools is not None and self._tools is not None:
            ends += tools.section.open
        yield from reader.until(ends, self._thought, keep=True)
        yield from reader.literal(reasoning.close)
        self._space, self._fresh = "", True

    # --- calls -----------------------------------------------------------------------------------

    def _free(self, section: Section) -> Reading[None]:
        reader = self._reader
        if section.bare:
            reader.kept = []
            yield from reader.space()
            yield from self._section(section, bare=True)
        while True:
            if not section.open:
                yield from reader.until((), self._content)
                return
            marker = yield from reader.until(section.open, self._content)
            if not marker:
                return
            reader.kept = [marker]
            yield from self._section(section, bare=False)

    def _section(self, section: Section, *, bare: bool) -> Reading[None]:
        """Calls; text that is none becomes content."""
        self._bare = bare
        try:
            yield from self._calls(section)
        except Unfit:
            kept, self._reader.kept = self._reader.kept, None
            if kept is None:  # within a call that has begun
                self._end_call(broken=True)
            elif bare or not (self._held and self._reader.exhausted):
                self._content("".join(kept))
        self._reader.kept = None

    def _calls(self, section: Section) -> Reading[None]:
        reader = self._reader
        yield from reader.space()
        listed = section.listed and (yield from reader.literal("["))
        if self._bare and section.listed and not listed:
            raise Unfit
        while True:
            yield from reader.space()
            yield from self._call(section.call)
            yield from reader.space()
            if listed:
                if (yield from reader.literal(",")):
                    continue
                yield from reader.expect("]")
                yield from reader.space()
                break
            if section.separator and (yield from reader.literal(section.separator)):
                continue
            if not section.many or not (yield from reader.peek()):
                break
            if section.close and (yield from reader.literal(section.close)):
                return
        if not section.close or (yield from reader.literal(section.close)):
            return
        if section.close_optional or reader.exhausted:
            return
        raise Unfit

    def _call(self, steps: tuple[Step, ...]) -> Reading[None]:
        name = ""
        identity = ""
        for step in steps:
            yield from self._reader.space()
            match step:
                case Lit(text=text, optional=optional):
                    if optional:
                        yield from self._reader.literal(text)
                    else:
                        yield from self._reader.expect(text)
                case Name():
                    name, identity = yield from self._name(step)
                case Arguments():
                    if (yield from self._reader.peek()) != "{":
                        raise Unfit
                    self._start_call(name, identity)
                    yield from self._reader.json(self._arguments)
                case CallObject():
                    yield from self._object(step)
                case Params():
                    self._start_call(name, identity)
                    yield from self._params(step, name)
                case PythonCall():
                    yield from self._python()
                case GemmaArguments(quote=quote):
                    pieces: list[str] = []
                    yield from self._balanced(pieces.append, (quote,))
                    arguments = gemma_arguments("".join(pieces), quote)
                    self._start_call(name, identity)
                    self._arguments(arguments)
        self._end_call()

    def _start_call(self, name: str, identity: str = "") -> None:
        if not name:
            raise Unfit
        self._known(name)
        self._reader.kept = None
        self._space, self._fresh = "", True
        self._events.append(CallStart(name, identity))

    def _known(self, name: str) -> None:
        """Without a marker, only a call of a known tool is one."""
        if self._bare and name not in (self._tools or ()):
            raise Unfit

    def _arguments(self, text: str) -> None:
        self._events.append(CallArguments(text))

    def _end_call(self, broken: bool = False) -> None:
        self._events.append(CallEnd(broken))
        if not broken:
            self._reader.kept = []

    def _name(self, step: Name) -> Reading[tuple[str, str]]:
        reader = self._reader
        name = yield from self._word()
        identity = ""
        yield from reader.space()
        if step.id_mark and (yield from reader.literal(step.id_mark)):
            identity = yield from self._word()
            yield from reader.space()
        for end in step.until:
            if (yield from reader.literal(end)):
                break
        else:
            char = yield from reader.peek()
            if not any(one.startswith(char) for one in step.keep if char):
                raise Unfit
        if not step.numbered:
            return name, identity
        bare, _, number = name.partition(":")
        return bare.removeprefix("functions."), name if number else ""

    def _word(self) -> Reading[str]:
        name = ""
        while (char := (yield from self._reader.peek())) and _NAME.match(char):
            name += self._reader.take(1)
            if len(name) > _LONGEST_NAME:
                raise Unfit
        return name

    def _object(self, step: CallObject) -> Reading[None]:
        """A call as a JSON object. Arguments that come before the name wait for it."""
        reader = self._reader
        yield from reader.expect("{")
        name, waiting, begun = "", "", False
        while True:
            yield from reader.space()
            if (yield from reader.literal("}")):
                break
            key = yield from reader.string()
            yield from reader.space()
            yield from reader.expect(":")
            yield from reader.space()
            if key in step.name and not name:
                name = yield from reader.string()
                self._known(name)
            elif key in step.arguments and not begun:
                begun = bool(name)
                if self._bare and not begun:
                    raise Unfit
                if begun:
                    self._start_call(name)
                pieces: list[str] = []
                quoted = (yield from reader.peek()) == '"'
                live = begun and not quoted
                yield from reader.json(self._arguments if live else pieces.append)
                text = _unquoted("".join(pieces)) if quoted else "".join(pieces)
                if begun and quoted:
                    self._arguments(text)
                elif not begun:
                    waiting = text
            else:
                if self._bare and key != "type":
                    raise Unfit
                yield from reader.json(lambda text: None)
            yield from reader.space()
            if not (yield from reader.literal(",")):
                yield from reader.expect("}")
                break
        if not begun:
            self._start_call(name)
            self._arguments(waiting or "{}")

    def _params(self, step: Params, name: str) -> Reading[None]:
        reader = self._reader
        schema = root_of((self._tools or {}).get(name))
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        lead = "{"
        while True:
            yield from reader.space()
            if not (yield from reader.literal(step.open)):
                break
            key: list[str] = []
            if not (yield from reader.until((step.key_end,), key.append)):
                raise Unfit
            if step.value_open:
                yield from reader.space()
                yield from reader.expect(step.value_open)
            value: list[str] = []
            if not (yield from reader.until((step.close,), value.append)):
                raise Unfit
            text = "".join(value).removeprefix(step.pad).removesuffix(step.pad)
            word = "".join(key).strip()
            kind = properties.get(word) if isinstance(properties, Mapping) else None
            self._arguments(f"{lead}{json.dumps(word, ensure_ascii=False)}: {typed(text, kind)}")
            lead = ", "
        self._arguments("{}" if lead == "{" else "}")

    def _python(self) -> Reading[None]:
        name = yield from self._word()
        if not name:
            raise Unfit
        self._known(name)
        pieces: list[str] = []
        yield from self._balanced(pieces.append, ('"', "'"))
        arguments = python_arguments("".join(pieces)[1:-1])
        self._start_call(name)
        self._arguments(arguments)

    def _balanced(self, sink: Any, quotes: tuple[str, ...]) -> Reading[None]:
        """Text from one bracket to its partner, quoted text as it is."""
        reader = self._reader
        if not (char := (yield from reader.peek())) or char not in "({[":
            raise Unfit
        stack: list[str] = []
        pairs = {"(": ")", "{": "}", "[": "]"}
        while True:
            mark = yield from reader.until((*quotes, *"(){}[]"), sink)
            if not mark:
                raise Unfit
            sink(mark)
            if mark in pairs:
                stack.append(pairs[mark])
            elif mark in quotes:
                while True:
                    inner = yield from reader.until((mark, "\\") if len(mark) == 1 else (mark,), sink)
                    if not inner:
                        raise Unfit
                    sink(inner)
                    if inner == mark:
                        break
                    if not (yield from reader.peek()):
                        raise Unfit
                    sink(reader.take(1))
            elif mark != stack.pop():
                raise Unfit
            if not stack:
                return

    # --- harmony ---------------------------------------------------------------------------------

    def _channels(self, c: Channels) -> Reading[None]:
        yield from self._wait()
        reader = self._reader
        marks = (c.start, c.channel, c.message, *c.ends)
        header: list[str] = []
        headed = thought = False
        while True:
            mark = yield from reader.until(marks, header.append)
            if mark == c.message:
                text = "".join(header)
                calls = _RECIPIENT.search(text) if self._tools is not None else None
                channel = text.rpartition(c.channel)[2].split()[:1]
                ends = (*c.ends, c.start)
                if calls is not None:
                    yield from self._channel_call(calls[1], ends)
                elif channel == [c.thinking]:
                    if thought:
                        self._events.append(Thought("\n"))
                    thought = True
                    yield from reader.until(ends, lambda t: self._events.append(Thought(t)), keep=True)
                else:
                    yield from reader.until(ends, lambda t: self._events.append(Content(t)), keep=True)
                header = []
            elif not mark:
                if not headed and header:
                    self._events.append(Content("".join(header)))
                return
            elif mark == c.channel:
                header.append(mark)
            else:
                header = []
            headed = True

    def _channel_call(self, name: str, ends: tuple[str, ...]) -> Reading[None]:
        self._events.append(CallStart(name))
        found = False

        def sink(text: str) -> None:
            nonlocal found
            found = True
            self._arguments(text)

        end = yield from self._reader.until(ends, sink, keep=True)
        if not found:
            self._arguments("{}")
        self._events.append(CallEnd(broken=not end and not found))


def _unquoted(text: str) -> str:
    """Arguments that a model wrote as JSON inside a JSON text."""
    try:
        return str(json.loads(text, strict=False))
    except ValueError as error:
        raise Unfit from error
