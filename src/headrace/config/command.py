"""The start command of a ``docker_server``: what the flags of vLLM and text-embeddings-inference say in our terms."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from headrace.config.foreign import TEI_FLAGS, VLLM_FLAGS, Foreign

__all__ = ["Command", "Flag", "read_command"]

_SHELLS = ("bash", "sh", "/bin/bash", "/bin/sh")
_ENDS = ("&&", "||", ";", "|", "&")
_HUMAN = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([kKmMgGtT])")
_TRUE = {"true": True, "false": False}


class Flag(NamedTuple):
    """One flag as written; ``option`` is None when it is not known, ``value`` when it cannot be read."""

    name: str
    option: Foreign | None
    value: Any


class Command(NamedTuple):
    """A server that somebody would have started.

    Attributes:
        program: as people call it.
        model: what it was to serve; "" when the command does not say.
    """

    program: str
    model: str
    flags: tuple[Flag, ...]


def read_command(text: str) -> Command | None:
    """The first known server in a shell command; None when there is none, or the text is no shell command."""
    try:
        words = _words(text)
    except ValueError:  # quotes that do not close
        return None
    for part in _parts(words):
        for place, word in enumerate(part):
            rest = part[place + 1 :]
            name = word.rsplit("/", 1)[-1]
            if name == "text-embeddings-router":
                return _command("text-embeddings-router", rest, TEI_FLAGS, "--model-id")
            if name == "vllm" and rest[:1] == ["serve"]:
                return _command("vllm serve", rest[1:], VLLM_FLAGS, "--model")
            if word == "vllm.entrypoints.openai.api_server":
                return _command("vllm serve", rest, VLLM_FLAGS, "--model")
    return None


def _words(text: str) -> list[str]:
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(lexer)
    for place, word in enumerate(words[:-2]):
        if word in _SHELLS and words[place + 1].startswith("-") and words[place + 1].endswith("c"):
            return _words(words[place + 2])
    return words


def _parts(words: Sequence[str]) -> Iterator[list[str]]:
    part: list[str] = []
    for word in words:
        if word in _ENDS:
            yield part
            part = []
        else:
            part.append(word)
    yield part


def _command(program: str, words: list[str], table: Sequence[Foreign], model_flag: str) -> Command:
    known = {option.name: option for option in table}
    flags: list[Flag] = []
    model = ""
    at = 0
    while at < len(words):
        name, equals, value = words[at].partition("=")
        at += 1
        if not name.startswith("-"):
            model = model or name  # vllm serve MODEL
            continue
        name = "--" + name.lstrip("-").replace("_", "-")
        option = known.get(name)
        bare = option is not None and option.kind == "bool"
        following = words[at] if at < len(words) and not words[at].startswith("--") else None
        if not equals and following is not None and (not bare or following.lower() in _TRUE):
            value, equals = following, "="
            at += 1
        if name == model_flag:
            model = value
        else:
            flags.append(Flag(name, option, _value(option, value, bool(equals))))
    return Command(program, model, tuple(flags))


def _value(option: Foreign | None, text: str, given: bool) -> Any:
    if option is None or "$" in text:  # a variable of the shell
        return None
    try:
        if option.kind == "bool":
            return _TRUE.get(text.lower()) if given else True
        if option.kind in ("int", "float"):
            return _integer(text) if option.kind == "int" else float(text)
    except ValueError:
        return None
    return text if option.kind == "str" and given else None


def _integer(text: str) -> int:
    """``32768``, or vLLM's ``32k`` (thousands) and ``32K`` (1024s). Raises ValueError for anything else."""
    found = _HUMAN.fullmatch(text)
    if found is None:
        return int(text)
    scale = (1000 if found[2].islower() else 1024) ** (1 + "kmgt".index(found[2].lower()))
    number = float(found[1]) * scale
    if number != int(number):
        raise ValueError(text)
    return int(number)
