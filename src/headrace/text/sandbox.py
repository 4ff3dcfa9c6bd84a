"""The jinja2 environment of chat templates: Hugging Face's dialect, sandboxed and bounded.

Templates come with checkpoints or even with requests, so they can be hostile. jinja2's sandbox keeps them
from Python; this keeps them from running or growing without end: loop rounds and calls are counted, the clock
is looked at while they run, and operations that can turn small values into huge ones are measured first. What
runs long inside one C function (comparing lists of lists of lists) is not covered.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

__all__ = ["Budget", "Exhausted", "environment", "spending"]


@dataclass(slots=True)
class Budget:
    """What one rendering may use.

    Attributes:
        steps: loop rounds and calls.
        seconds: of its thread's processor time: an honest template is not to blame for a machine that stands still.
        characters: of the result and of any single text on the way; four times as many in all.
    """

    steps: int = 2_000_000
    seconds: float = 5.0
    characters: int = 16 << 20


class Exhausted(jinja2.TemplateError):
    """The budget is used up."""


class _Meter:
    __slots__ = ("budget", "deadline", "left", "steps")

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.steps = budget.steps
        self.left = 4 * budget.characters
        self.deadline = time.thread_time() + budget.seconds

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise Exhausted(f"the template takes more than {self.budget.steps} steps")
        if not self.steps & 7 and time.thread_time() > self.deadline:
            raise Exhausted(f"the template takes longer than {self.budget.seconds:g} s")

    def size(self, characters: int) -> None:
        if characters > self.budget.characters:
            raise Exhausted(f"the template makes a value of more than {self.budget.characters} characters")
        self.left -= characters
        if self.left < 0:
            raise Exhausted("the template writes without end")
        self.step()


_meter: ContextVar[_Meter | None] = ContextVar("meter", default=None)


@contextmanager
def spending(budget: Budget) -> Iterator[None]:
    """Renderings inside use this budget together."""
    token = _meter.set(_Meter(budget))
    try:
        yield
    finally:
        _meter.reset(token)


def _current() -> _Meter:
    meter = _meter.get()
    if meter is None:  # constant folding while a template is compiled
        meter = _Meter(Budget(steps=100_000, seconds=1.0, characters=1 << 20))
    return meter


# The three that follow take the context only because that keeps jinja2 from folding them at compile time.


@jinja2.pass_context
def _counted(context: Any, values: Iterable[Any], written: int) -> Iterator[Any]:
    """What a loop runs over; ``written`` characters of plain template text come out each round."""
    meter = _current()
    for value in values:
        meter.size(written)
        yield value


@jinja2.pass_context
def _measured(context: Any, value: Any) -> Any:
    """A value on its way into text. A doubling chain is caught one step late, at twice the limit."""
    _current().size(_deep_size(value))
    return value


@jinja2.pass_context
def _charged(context: Any, written: int) -> str:
    """The first thing in a macro: its plain text."""
    _current().size(written)
    return ""


def _deep_size(value: Any, limit: int = 4_000_000) -> int:
    """Roughly the characters that a value has as text, counted no further than the limit."""
    size = 0
    todo = [value]
    while todo and size < limit:
        one = todo.pop()
        if isinstance(one, (str, bytes)):
            size += len(one)
        elif isinstance(one, dict):
            todo += [*one.keys(), *one.values()]
        elif isinstance(one, (list, tuple)):
            size += 2 * len(one)
            todo += one
        else:
            size += 8
    return size if size < limit else 1 << 62


def _measure(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple)) else 0


def _limited_range(*bounds: int) -> range:
    numbers = range(*bounds)
    if len(numbers) > 10_000:
        raise Exhausted("the template asks for a range of more than 10000 numbers")
    return numbers


def _check_numbers(values: Iterable[Any]) -> None:
    """Refuse widths and repeat counts that no chat template needs."""
    for value in values:
        if isinstance(value, int) and abs(value) > 1_000_000:
            raise Exhausted(f"the template passes the number {value} to an operation on text")


_WIDTH = re.compile(r"\d{5}")


def _check_format(text: Any) -> None:
    """Refuse format strings with widths of five digits and more, and widths taken from arguments."""
    if isinstance(text, str) and ("%" in text or "{" in text) and (_WIDTH.search(text) or "*" in text):
        raise Exhausted("the template formats with a width of more than four digits")


class _Environment(ImmutableSandboxedEnvironment):
    """Counts loop rounds and calls, and measures what grows."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        """Put the meter at every loop, macro, `~` and output before the template becomes Python."""
        for joined in list(source.find_all(nodes.Concat)):
            joined.nodes = [_filter(part, "_measured") for part in joined.nodes]
        for output in list(source.find_all(nodes.Output)):
            output.nodes = [
                part if isinstance(part, nodes.Literal) else _filter(part, "_measured")
                for part in output.nodes
            ]
        for loop in list(source.find_all(nodes.For)):
            iterated: Any = loop.iter
            loop.iter = _filter(iterated, "_counted", nodes.Const(_plain_text(loop.body)))
        blocks: list[Any] = [*source.find_all(nodes.Macro), *source.find_all(nodes.CallBlock)]
        for block in blocks:
            charge = _filter(nodes.Const(_plain_text(block.body)), "_charged")
            block.body = [nodes.Output([charge]), *block.body]
        return super()._generate(source, *args, **kwargs)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        _current().step()
        method = getattr(obj, "__wrapped__", obj)  # jinja2 wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, (str, bytes)):
            _check_method(owner, getattr(method, "__name__", ""), args, kwargs)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        meter = _current()
        if operator == "+":
            meter.size(_measure(left) + _measure(right))
        elif operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(other, int):
                    meter.size(_measure(one) * abs(other))
            _check_digits(left, right)
        elif operator == "**":
            if abs(right) > 64 or (isinstance(left, int) and left.bit_length() > 64):
                raise Exhausted("the template raises a number to a high power")
        else:
            _check_format(left)
            meter.size(_deep_size(left) + _deep_size(right))
        return super().call_binop(context, operator, left, right)


def _check_digits(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > 4096:
        raise Exhausted("the template multiplies numbers of thousands of digits")


def _check_method(owner: str | bytes, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _check_numbers((*args, *kwargs.values()))
    if name in ("format", "format_map"):
        _check_format(owner)
    elif name == "replace" and len(args) >= 2:
        _check_replace(owner, args[0], args[1])
    elif name == "join" and args and isinstance(args[0], (list, tuple)):
        _check_join(owner, args[0])
    elif name == "expandtabs":
        tab = next((value for value in (*args, *kwargs.values()) if isinstance(value, int)), 8)
        _current().size(len(owner) * abs(tab))


def _check_replace(text: Any, old: Any, new: Any) -> None:
    if isinstance(text, str) and isinstance(old, str) and isinstance(new, str):
        _current().size(len(text) + text.count(old) * len(new))


def _check_join(separator: Any, values: Any) -> None:
    between = len(separator) * len(values) if isinstance(separator, (str, bytes)) else 0
    _current().size(between + sum(_measure(value) for value in values))


def _filter(node: nodes.Expr, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def _plain_text(body: list[nodes.Node]) -> int:
    """Characters of template text in a body, without loops and macros inside, which count their own."""
    size = 0
    todo: list[nodes.Node] = list(body)
    while todo:
        node = todo.pop()
        if isinstance(node, nodes.TemplateData):
            size += len(node.data)
        if not isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock)):
            todo += node.iter_child_nodes()
    return size


def _bounded(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A built-in filter whose result could be far larger than what goes in."""

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        plain = [value for value in (*args, *kwargs.values()) if isinstance(value, (str, int))]
        _check_numbers(plain)
        if name == "format":
            _check_format(plain[0] if plain else "")
        elif name == "replace":
            texts = [value for value in args if isinstance(value, str)]
            if len(texts) >= 3:
                _check_replace(texts[-3], texts[-2], texts[-1])
        elif name == "indent":
            text = next((value for value in plain if isinstance(value, str)), "")
            widths = [value for value in plain[1:] if isinstance(value, int)]
            _current().size(len(text) + (text.count("\n") + 1) * max(widths, default=4))
        _current().size(sum(_deep_size(value) for value in args))
        result = function(*args, **kwargs)
        _current().size(_measure(result))
        return result

    return checked


class _GenerationTag(Extension):
    """`{% generation %}` marks what the assistant wrote; for inference it only wraps."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _SafeNamespace(Namespace):
    """jinja2's namespace without names that begin with an underscore."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        values = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        super().__init__(values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not hold the name {name!r}")


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as Hugging Face writes it into prompts: no HTML escapes, Unicode as it is."""
    if indent is not None:
        _check_numbers((indent,))
    _current().size(_deep_size(value) * (1 + int(indent or 0)))
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


# Filters that write out containers or can make their text much longer.
_AMPLIFYING = (
    "center format indent join replace wordwrap batch slice truncate string pprint trim upper lower title "
    "capitalize escape e forceescape safe striptags urlize urlencode wordcount xmlattr sum"
)


def environment() -> jinja2.Environment:
    """A new environment."""
    env = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols], auto_reload=False
    )
    for name in _AMPLIFYING.split():
        env.filters[name] = _bounded(env.filters[name], name)
    env.filters["tojson"] = _tojson
    env.filters["_counted"] = _counted
    env.filters["_measured"] = _measured
    env.filters["_charged"] = _charged
    env.globals["range"] = _limited_range
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = _strftime_now
    env.globals["namespace"] = _SafeNamespace
    del env.globals["lipsum"]
    return env
