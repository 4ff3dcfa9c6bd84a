"""A format's declaration as a Lark grammar, so that a forced or begun call follows its tool's schema."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from headrace.execution.constraints.grammar import WHITESPACE
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
    Section,
    Step,
)
from headrace.serving.parsers.values import kinds_of

__all__ = ["ToolGrammar", "free_strings", "root_of", "writable"]

SpecialId = Callable[[str], int | None]
_UNCHECKED = ("pattern", "format", "minLength", "maxLength")
_SHARED = ("$defs", "definitions", "x-guidance")
_TEXT = "/(.|\\n)*/"
_GAP = "[ \\n\\t]{0,8}"  # white space that a model may put between the parts of a call


class ToolGrammar:
    """Writes one grammar.

    Args:
        format: the model's.
        tools: name -> schema of its parameters, as the compiler gets it.
        special: id of a text that is one special token of the vocabulary, else None.
    """

    def __init__(self, format: Format, tools: Mapping[str, Any], special: SpecialId) -> None:
        self._format = format
        self._tools = list(tools.items())
        self._special = special
        self._rules: list[str] = []
        self._count = 0

    def forced(self, *, parallel: bool, instead: str = "") -> str:
        """Nothing but calls, one or more; or all of it what ``instead`` says."""
        if self._format.channels is not None:
            return self._harmony(self._format.channels, answer=self._rule(instead) if instead else "")
        assert self._format.tools is not None
        section = self._format.tools.section
        opener = "" if section.bare else self._literal(section.open[0])
        one = self._rule(f"{opener} {self._body(section, parallel)}")
        repeat = parallel and not section.listed and not section.separator and not _marked(section)
        gap = '"\\n"?'
        calls = f"{one} ({gap} {one})*" if repeat else one
        return self._grammar(f"{calls} | {self._rule(instead)}" if instead else calls)

    def triggered(self, *, parallel: bool) -> str | None:
        """Free text in which whatever begins like a call is one; None where there is no telling."""
        if self._format.channels is not None:
            return self._harmony(self._format.channels, free=True)
        tools = self._format.tools
        if tools is None:
            return None
        section = tools.section
        begins, barred = [], []
        for marker in section.open:
            number = self._special(marker)
            if number is not None:
                begins.append(f"text <[{number}]>")
            elif section.bare:
                barred.append(f"(.|\\n)*{_regex(marker)}(.|\\n)*")
            else:
                self._count += 1
                self._rules.append(f"trigger_{self._count}[lazy]: /(.|\\n)*{_regex(marker)}/")
                begins.append(f"trigger_{self._count}")
        if section.bare:
            return self._bare(section, begins, barred, parallel)
        self._rules.append(f"text: {_TEXT}")
        one = self._rule(f"({' | '.join(begins)}) {self._body(section, parallel)}")
        return self._grammar(f"{one}* text" if parallel else f"text | {one}")

    def _bare(self, section: Section, begins: list[str], barred: list[str], parallel: bool) -> str:
        """Calls may begin a turn unmarked: text that begins like one of a known tool is one.

        The lexer cannot follow text and a call side by side over several terminals, so the head of a call, up to where
        its arguments begin, is one terminal, and text is what begins like no head.
        """
        step = section.call[0]
        names = "|".join(_in_text(name) for name, _ in self._tools)
        firsts, others = [], []
        for name, schema in self._tools:
            if isinstance(step, CallObject):
                head = _object_head(step, _in_text(name))
                head += f'{_GAP},{_GAP}"{step.arguments[0]}"{_GAP}:{_GAP}'
                rest = f"{self._json(schema)} /{_GAP}\\}}/"
            else:
                head = f"{_GAP}\\[{_in_text(name)}\\("
                rest = self._python_arguments(schema)
            self._count += 1
            self._rules.append(f"HEAD_{self._count}: /{head}/")
            firsts.append(f"HEAD_{self._count} {rest}")
            others.append(self._call(section.call, name, schema) if section.listed else "")
        if isinstance(step, CallObject):
            barred.append(f"{_object_head(step, names)}(.|\\n)*")
        else:
            barred.append(f"{_GAP}\\[({names})\\((.|\\n)*")
        one = self._rule(" | ".join(firsts))
        more = self._rule(" | ".join(others)) if section.listed else one
        gap = '"," " "?' if section.listed else f'{_quote(section.separator)} " "?'
        again = f"({gap} {more})*" if parallel else ""
        calls = self._rule(f"{one} {again} {_quote(']') if section.listed else ''}")
        self._rules.append(f"PLAIN: {_TEXT} & ~/({'|'.join(barred)})/")
        marked = "".join(f" | {begin.replace('text', 'PLAIN')} {calls}" for begin in begins)
        return self._grammar(f"PLAIN | {calls}{marked}")

    def _grammar(self, start: str) -> str:
        return "\n".join((f"start: {start}", *self._rules))

    def _rule(self, body: str) -> str:
        self._count += 1
        self._rules.append(f"r{self._count}: {body}")
        return f"r{self._count}"

    def _literal(self, text: str) -> str:
        number = self._special(text)
        return _quote(text) if number is None else f"<[{number}]>"

    # --- calls -----------------------------------------------------------------------------------

    def _body(self, section: Section, parallel: bool) -> str:
        call = self._rule(" | ".join(self._call(section.call, name, schema) for name, schema in self._tools))
        close = self._literal(section.close) if section.close and not section.bare else ""
        space = "/[ \\n]?/" if section.open and self._special(section.open[0]) is None else ""
        if section.listed:
            more = f'("," " "? {call})*' if parallel else ""
            return f'{space} "[" {call} {more} "]" {close}'
        if parallel and (_marked(section) or section.separator):
            gap = _quote(section.separator) + ' " "?' if section.separator else '"\\n"?'
            return f"{space} {call} ({gap} {call})* {self._gap(close)} {close}"
        return f"{space} {call} {self._gap(close)} {close}"

    def _gap(self, close: str) -> str:
        """A line break that models write before a marker of plain text."""
        return '"\\n"?' if close.startswith('"') else ""

    def _call(self, steps: Sequence[Step], name: str, schema: Any) -> str:
        return self._rule(" ".join(part for step in steps for part in self._step(step, name, schema)))

    def _step(self, step: Step, name: str, schema: Any) -> Iterator[str]:
        match step:
            case Lit(text=text, before=before):
                yield from self._written(before, text)
            case Name(until=until, numbered=numbered):
                yield _quote(f"functions.{name}:" if numbered else name)
                if numbered:
                    yield "/[0-9]+/"
                if step.id_mark and (number := self._special(step.id_mark)) is not None:
                    yield f"(<[{number}]> /[A-Za-z0-9]{{9}}/)?"
                yield from self._written(step.before, until[0] if until else "", step.after)
            case Arguments():
                yield self._json(schema)
            case CallObject(name=names, arguments=arguments):
                yield _quote(f'{{"{names[0]}": {json.dumps(name)}, "{arguments[0]}": ')
                yield self._json(schema)
                yield _quote("}")
            case Params():
                for key, kind, needed in _properties(schema):
                    rule = self._param(step, key, kind)
                    yield rule if needed else f"{rule}?"
            case PythonCall():
                yield _quote(f"{name}(")
                yield self._python_arguments(schema)
            case GemmaArguments(quote=quote):
                yield _quote("{")
                yield self._separated(
                    schema,
                    ",",
                    lambda key, kind: f"{_quote(key + ':')} {self._text_or_json(kind, quote, quote)}",
                )
                yield _quote("}")

    def _python_arguments(self, schema: Any) -> str:
        named = self._separated(schema, ", ", lambda key, kind: f"{_quote(key + '=')} {self._python(kind)}")
        return f"{named} {_quote(')')}"

    def _written(self, *texts: str) -> Iterator[str]:
        return (self._literal(text) for text in texts if text)

    # --- values ----------------------------------------------------------------------------------

    def _json(self, schema: Any) -> str:
        if isinstance(schema, dict):
            options = {"whitespace_pattern": WHITESPACE, **schema.get("x-guidance", {})}
            schema = {**schema, "x-guidance": options}
        return self._rule(f"%json {json.dumps(schema)}")

    def _param(self, step: Params, key: str, kind: Any) -> str:
        begin = f"{_quote(step.open + key + step.key_end)}"
        if step.value_open:
            begin += f' "\\n" {_quote(step.value_open)}'
        before = f" {_quote(step.pad)}" if step.pad else ""
        value = self._text_or_json(kind, "", step.pad + step.close)
        return self._rule(f'{begin}{before} {value} "\\n"?')

    def _text_or_json(self, kind: Any, before: str, after: str) -> str:
        """A text up to ``after``, one of some texts, or JSON; ``after`` included."""
        opening = _quote(before) if before else ""
        texts = _texts(kind)
        if texts is not None:
            return f"{opening} ({' | '.join(_quote(text) for text in texts)}) {_quote(after)}"
        if _is_text(kind):
            number = self._special(after)
            if number is not None:
                return f"{opening} {_TEXT} <[{number}]>"
            self._count += 1
            self._rules.append(f"until_{self._count}[lazy]: /(.|\\n)*{_regex(after)}/")
            return f"{opening} until_{self._count}"
        closing = "" if before else _quote(after)
        return f"{self._json(kind)} {closing}"

    def _python(self, kind: Any) -> str:
        given = kind.get("type") if isinstance(kind, Mapping) else None
        if given == "boolean" and not {"const", "enum"} & set(kind):
            return '("True" | "False")'
        if given == "null":
            return '"None"'
        # JSON's other escapes mean something else in Python.
        options = (
            {"json_allowed_escapes": 'nrbtf\\"u'} | kind.get("x-guidance", {})
            if isinstance(kind, dict)
            else {}
        )
        return self._json({**kind, "x-guidance": options} if isinstance(kind, dict) else kind)

    def _separated(self, schema: Any, separator: str, item: Callable[[str, Any], str]) -> str:
        """Properties in order, optional ones or not, with separators only between."""
        properties = list(_properties(schema))
        after: dict[bool, str] = {True: '""', False: '""'}  # what follows, by whether nothing came so far
        for key, kind, needed in reversed(properties):
            one = self._rule(item(key, kind))
            new = {}
            for first in (True, False):
                with_it = f"{'' if first else _quote(separator)} {one} {after[False]}"
                new[first] = self._rule(with_it if needed else f"{with_it} | {after[first]}")
            after = new
        return after[True]

    def _harmony(self, c: Channels, *, free: bool = False, answer: str = "") -> str:
        """Thinking as the model likes, then one call, whose end token ends the turn.

        Args:
            free: or any other message, several before the last.
            answer: what the final message follows instead.
        """
        mark = self._literal
        self._rules.append(f"text: {_TEXT}")
        constrain = self._rule(f'" "? {mark(c.constrain)} "json"')
        calls = []
        for name, schema in self._tools:
            to, arguments = _quote(f" to=functions.{name}"), self._json(schema)
            header = f'{mark(c.channel)} "commentary"'
            calls.append(f"({header} {to} | {to} {header}) {constrain}? {mark(c.message)} {arguments}")
        end = f'text {mark(c.ends[0])} {mark(c.start)} "assistant"'
        last = self._rule(" | ".join(calls)) if calls else ""
        spoken = f'"{c.thinking}"'
        if free or answer:
            final = f'{mark(c.channel)} "{c.answer}" {constrain}? {mark(c.message)} {answer or "text"}'
            last = self._rule(f"{last} | {final}" if last else final)
            spoken += ' | "commentary"'
        before = self._rule(f"{mark(c.channel)} ({spoken}) {mark(c.message)} {end}")
        return self._grammar(f"{before}* {last}")


def _in_text(name: str) -> str:
    """A regex of a name as it stands within a JSON text."""
    return _regex(json.dumps(name, ensure_ascii=False)[1:-1])


def _object_head(step: CallObject, names: str) -> str:
    """A regex of how a call as an object begins, perhaps with its type, up to the end of its name."""
    kind = f'"type"{_GAP}:{_GAP}"function"{_GAP},{_GAP}'
    return f'{_GAP}\\{{{_GAP}({kind})?"{step.name[0]}"{_GAP}:{_GAP}"({names})"'


def _marked(section: Section) -> bool:
    """Each call has markers of its own within the section."""
    return section.many and isinstance(section.call[0], Lit)


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _regex(text: str) -> str:
    return re.sub(r"([!-/:;=?@\[-`{-~])", r"\\\1", text).replace("\n", "\\n")


def root_of(schema: Any) -> Any:
    """The schema that a reference at the root of a document leads to, with its definitions."""
    here, seen = schema, 0
    while isinstance(here, Mapping) and isinstance(here.get("$ref"), str) and seen < 8:
        place: Any = schema
        for step in here["$ref"].removeprefix("#").split("/")[1:]:
            place = place.get(step) if isinstance(place, Mapping) else None
        here, seen = place, seen + 1
    if here is schema or not isinstance(here, Mapping):
        return here
    return {**{key: schema[key] for key in _SHARED if key in schema}, **here}


def _properties(schema: Any) -> Iterator[tuple[str, Any, bool]]:
    """(name, schema with the root's definitions, required) of each property."""
    schema = root_of(schema)
    if not isinstance(schema, Mapping):
        return
    shared = {key: schema[key] for key in _SHARED if key in schema}
    required = schema.get("required") or ()
    properties = schema.get("properties")
    for key, kind in properties.items() if isinstance(properties, Mapping) else ():
        yield key, {**shared, **kind} if isinstance(kind, Mapping) else kind, key in required


def _texts(kind: Any) -> list[str] | None:
    if not isinstance(kind, Mapping):
        return None
    values = [kind["const"]] if "const" in kind else kind.get("enum")
    return (
        values
        if isinstance(values, list) and values and all(isinstance(v, str) and v for v in values)
        else None
    )


def _is_text(kind: Any) -> bool:
    """Whether a bare text may stand here; what else the schema allows can be written as one too."""
    return "string" in kinds_of(kind)


def writable(format: Format, schema: Any) -> bool:
    """Whether the format can write all that the schema asks for: some know nothing but named properties."""
    steps = format.tools.section.call if format.tools is not None else ()
    if not any(isinstance(step, (Params, GemmaArguments, PythonCall)) for step in steps):
        return True
    root = root_of(schema)
    if not isinstance(root, Mapping) or {"anyOf", "allOf", "oneOf", "enum", "const"} & root.keys():
        return False
    return set(root.get("required") or ()) <= {key for key, _, _ in _properties(schema)}


def free_strings(format: Format, schema: Any) -> list[str]:
    """Keywords on bare texts that a tagged format cannot be held to, as ``name.keyword``."""
    steps = format.tools.section.call if format.tools is not None else ()
    if not any(isinstance(step, (Params, GemmaArguments)) for step in steps):
        return []
    return [
        f"{key}.{keyword}"
        for key, kind, _ in _properties(schema)
        if _is_text(kind) and _texts(kind) is None
        for keyword in _UNCHECKED
        if keyword in kind
    ]
