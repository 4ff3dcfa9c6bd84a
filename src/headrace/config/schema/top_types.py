"""Values that only the outside of config.yaml has: amounts of memory, addresses, secrets, accelerators."""

from __future__ import annotations

import ipaddress
import re
from typing import Any

from headrace.config.accelerators import parse_accelerator
from headrace.config.report import Place
from headrace.config.schema.own import OWN
from headrace.config.schema.types import ListOf, Reading, Str, Type
from headrace.config.yaml import Node

__all__ = [
    "AcceleratorType",
    "Environment",
    "Metadata",
    "Secrets",
    "absolute_or_empty",
    "address",
    "cpu",
    "host",
    "memory",
    "memory_bytes",
    "python",
]

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15, "E": 10**18} | {
    f"{prefix}i": 1024**power for power, prefix in enumerate("KMGTPE", 1)
}
_MOST = 2**80
_PLACEHOLDERS = {"null", "none", "placeholder", "set token in baseten workspace", "changeme", "xxx", "..."}


def memory_bytes(text: str) -> int:
    """``2Gi``, ``512M`` or plain bytes.

    Raises:
        ValueError: with the known units.
    """
    match = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)\s*([a-zA-Z]*)", text.strip())
    if match is None or match[2] not in _UNITS:
        units = ", ".join(unit for unit in _UNITS if unit)
        raise ValueError(f"is {text[:40]!r}; expected bytes with a unit of {units}, such as 16Gi")
    size = float(match[1]) * _UNITS[match[2]]
    if size > _MOST:
        raise ValueError(f"is {text[:40]!r}, more than any machine has; expected bytes, such as 16Gi")
    return int(size)


def memory(text: str) -> str:
    memory_bytes(text)
    return text


def cpu(text: str) -> str:
    if not re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)m?", text.strip()):
        raise ValueError(f"is {text[:40]!r}; expected cores such as 4, or thousandths such as 500m")
    return text


def python(text: str) -> str:
    known = [f"py3{minor}" for minor in range(9, 15)]
    if text not in known:
        raise ValueError(f"is {text[:40]!r}; expected one of {', '.join(known)}")
    return text


def address(text: str) -> str:
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f"{text[:60]!r} is no IPv4 address or range such as 10.0.0.0/8") from None
    if network.version != 4:
        raise ValueError(f"{text[:60]!r} is IPv6; only IPv4 is supported")
    return text


def host(text: str) -> str:
    label = r"[a-zA-Z0-9*](?:[a-zA-Z0-9*-]{0,61}[a-zA-Z0-9*])?"
    if len(text) > 253 or not re.fullmatch(rf"{label}(?:\.{label})*", text):
        raise ValueError(f"{text[:60]!r} is no host name; '*' may stand inside a label")
    return text


def _secret_name(text: str) -> str:
    if not text or len(text) > 253 or text in (".", ".."):
        raise ValueError(f"the secret's name {text[:40]!r} is refused: 1 to 253 characters")
    if not re.fullmatch(r"[-._a-zA-Z0-9]+", text) and not text.startswith("DOCKER_REGISTRY_"):
        raise ValueError(f"the secret's name {text[:40]!r} is refused: letters, digits and - . _ only")
    return text


def absolute_or_empty(text: str) -> str:
    if text and not text.startswith("/"):
        raise ValueError(f"is {text[:80]!r}; expected an absolute path")
    return text


class Secrets(Type):
    """Names of secrets. Values are placeholders; whatever stands there is never kept or shown."""

    def read(self, node: Node, path: str, reading: Reading) -> Any:
        if not isinstance(node.value, dict):
            return reading.wrong(f"is {node.kind()}; expected a mapping of names to null", path, node.place)
        for name, child in node.value.items():
            inner, place = f"{path}.{name}", node.key_places[name]
            try:
                _secret_name(name)
            except ValueError as error:
                reading.wrong(str(error), inner, place)
            if child.value is not None and not isinstance(child.value, str):
                reading.wrong(f"is {child.kind()}; expected null as a placeholder", inner, child.place)
            elif child.value and child.value.lower() not in _PLACEHOLDERS:
                reading.report.notice(
                    "warning",
                    "the value here is ignored, and a secret does not belong into this file: "
                    "write null and set it in the environment or a file (docs/config.md)",
                    inner,
                    place,
                )
        return dict.fromkeys(node.value)

    def describe(self) -> str:
        return "map of name to null"


class Environment(Type):
    """Variables for the process; every scalar becomes text, booleans as true and false."""

    def read(self, node: Node, path: str, reading: Reading) -> Any:
        if not isinstance(node.value, dict):
            return reading.wrong(f"is {node.kind()}; expected a mapping of names to texts", path, node.place)
        values: dict[str, Any] = {}
        for name, child in node.value.items():
            inner, place = f"{path}.{name}", node.key_places[name]
            reading.places[inner] = place
            if isinstance(child.value, (dict, list)) or child.value is None:
                values[name] = reading.wrong(f"is {child.kind()}; expected text", inner, child.place)
            else:
                values[name] = self._text(child, inner, place, reading)
        return values

    def _text(self, child: Node, path: str, place: Place, reading: Reading) -> str:
        if isinstance(child.value, bool):
            return str(child.value).lower()
        text = str(child.value)
        if not isinstance(child.value, str) and text != child.text:
            reading.report.notice(
                "warning",
                f"YAML reads {child.text[:40]} as {text[:40]}; quote it to keep the text",
                path,
                place,
            )
        return text

    def describe(self) -> str:
        return "map of name to text"


class AcceleratorType(Type):
    """``TYPE[:count]``, or null for none."""

    def read(self, node: Node, path: str, reading: Reading) -> Any:
        if node.value is None:
            return None
        if not isinstance(node.value, str):
            return reading.wrong(
                f"is {node.kind()}; expected TYPE or TYPE:count, such as H100:2", path, node.place
            )
        try:
            found = parse_accelerator(node.value)
        except ValueError as error:
            return reading.wrong(str(error), path, node.place)
        if found.gpu is not None and not found.gpu.hosted:
            note = f"{found.name}: the hosted system has none; plans know it"
            reading.report.notice("lifted", note, path, node.place)
        return str(found)

    def describe(self) -> str:
        return "TYPE[:count]"


class Metadata(Type):
    """Free-form, but for ``tags`` and our own ``headrace`` block."""

    def read(self, node: Node, path: str, reading: Reading) -> Any:
        if not isinstance(node.value, dict):
            return reading.wrong(f"is {node.kind()}; expected a mapping", path, node.place)
        values: dict[str, Any] = {}
        for name, child in node.value.items():
            inner = f"{path}.{name}"
            reading.places[inner] = node.key_places[name]
            if name == "tags":
                values[name] = ListOf(Str(numbers=True)).read(child, inner, reading)
            elif name == "headrace":
                values[name] = OWN.read(child, inner, reading)
            else:
                values[name] = child.plain()
        return values

    def describe(self) -> str:
        return "map"
