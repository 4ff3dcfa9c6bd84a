"""Secrets by name, from the environment or mounted files; their values never show by accident."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from headrace.config import env
from headrace.errors import ConfigError

__all__ = ["Secret", "find_secret", "hide", "hide_variables", "missing_secrets", "require_secret"]

_MAX_BYTES = 64 * 1024
_ALSO = {"hf_access_token": ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
_NAME = re.compile(r"[-._a-zA-Z0-9]{1,253}")


class Secret:
    """A value that ``reveal()`` hands on and that shows as stars elsewhere: in str, repr, format, logs, JSON.

    Pickling is refused, so that it crosses no process border unnoticed.
    """

    __slots__ = ("_value", "name", "origin")

    def __init__(self, value: str, name: str = "", origin: str = "") -> None:
        self._value = value
        self.name = name
        self.origin = origin

    def reveal(self) -> str:
        """The value itself."""
        return self._value

    def __repr__(self) -> str:
        return f"Secret({self.name!r}, '***')" if self.name else "Secret('***')"

    def __str__(self) -> str:
        return "***"

    def __format__(self, spec: str) -> str:
        return format("***", spec)

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash((Secret, self._value))

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is not pickled; hand on its name and look it up again")


def find_secret(name: str) -> Secret | None:
    """Look a secret up by name; the first of these that is there and not empty:

    the variable ``TRUSS_SECRET_<name>``; for ``hf_access_token`` also ``HF_TOKEN`` and
    ``HUGGING_FACE_HUB_TOKEN``; the file ``<name>`` in HEADRACE_SECRETS_DIR (default ``/secrets``). One final
    line break of a file is not part of it.

    Raises:
        ConfigError: the name is no name, or the file cannot be read.
    """
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise ConfigError(f"the secret's name {name[:60]!r} is refused: letters, digits and - . _ only")
    for variable in (f"TRUSS_SECRET_{name}", *_ALSO.get(name, ())):
        value = env.variable(variable)
        if value:
            return Secret(value, name, f"variable {variable}")
    file = env.secrets_folder() / name
    try:
        if not file.is_file():
            return None
        if file.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"the secret {name!r}: {file} is over {_MAX_BYTES // 1024} KiB")
        value = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"the secret {name!r}: {file} cannot be read: {reason}") from None
    value = value.removesuffix("\n").removesuffix("\r")
    return Secret(value, name, f"file {file}") if value else None


def require_secret(name: str, purpose: str) -> Secret:
    """find_secret, or ConfigError that says where to put it."""
    found = find_secret(name)
    if found is None:
        more = "".join(f", {variable}" for variable in _ALSO.get(name, ()))
        raise ConfigError(
            f"{purpose} needs the secret {name!r}: set the variable TRUSS_SECRET_{name}{more}, or write "
            f"it into the file {env.secrets_folder() / name}",
            param=name,
        )
    return found


def missing_secrets(names: Iterable[str]) -> list[str]:
    """Names that a configuration lists and that lie nowhere. Raises as find_secret does."""
    return [name for name in names if find_secret(name) is None]


def hide(text: str, secrets: Iterable[Secret]) -> str:
    """Text with every value replaced by stars, for messages that came from elsewhere."""
    for value in sorted({secret.reveal() for secret in secrets if secret}, key=len, reverse=True):
        text = text.replace(value, "***")
    return text


def hide_variables(variables: Mapping[str, str]) -> dict[str, Any]:
    """Environment variables for people: values of those whose name sounds like a credential become stars."""
    words = ("token", "key", "secret", "password", "passwd", "credential", "auth")
    return {
        name: "***" if any(word in name.lower() for word in words) else value
        for name, value in variables.items()
    }
