"""From what the user wrote to one EngineSpec, the same from YAML, flags or Python."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from headrace.config.load import check_file
from headrace.config.report import Place, Report
from headrace.config.schema.own import OWN
from headrace.config.schema.types import INVALID, Reading
from headrace.config.schema.view import View
from headrace.config.secrets import hide_variables
from headrace.config.spec import Adapter, Calibration, EngineSpec, Speculation
from headrace.config.support import gaps
from headrace.config.translate import own_settings
from headrace.config.yaml import Node
from headrace.errors import ConfigError

__all__ = ["Resolution", "is_config_file", "make_spec", "redacted", "resolve", "resolve_view"]


class Resolution(msgspec.Struct, frozen=True):
    """A specification and how it came about.

    Attributes:
        report: notices on what is lifted, without effect, or not there yet.
        accelerator: ``TYPE:count`` of the file, or "".
        origins: EngineSpec field -> who set it (a key with its line, ``--flag``, ``argument``).
    """

    spec: EngineSpec
    report: Report
    accelerator: str = ""
    origins: dict[str, str] = {}


def is_config_file(model: str) -> bool:
    """Whether the argument names a config.yaml (or a folder with one and without config.json)."""
    path = Path(model)
    if path.suffix in (".yaml", ".yml"):
        return True
    return (path / "config.yaml").is_file() and not (path / "config.json").exists()


def resolve(model: str | None = None, *, origin: str = "argument", **settings: Any) -> Resolution:
    """Resolve a model name or a config.yaml, with settings that win over the file.

    Args:
        model: a file (see is_config_file), or a folder, GGUF file, packaged name or hub id.
        origin: how ``settings`` were given, for messages: ``argument`` or ``flag``.
        settings: fields of EngineSpec; None means not given.
    Raises:
        ConfigError: everything that is wrong, together.
    """
    if model is not None and is_config_file(model):
        return resolve_view(check_file(model), settings, origin)
    given = {name: value for name, value in settings.items() if value is not None}
    if model is not None:
        given["model"] = model
    report = Report()
    spec = make_spec(given, report, origin)
    for gap, sentence in gaps(spec):
        report.notice("not_yet" if gap.blocks else "differs", sentence, gap.field)
    return Resolution(spec, report, origins=dict.fromkeys(given, origin))


def resolve_view(
    view: View, settings: Mapping[str, Any] | None = None, origin: str = "argument"
) -> Resolution:
    """Resolve a checked file. Raises ConfigError with all its problems."""
    view.report.raise_problems()
    found = own_settings(view)
    values = {name: value for name, (value, _) in found.items()}
    origins = {name: f"{path} ({view.place(path)})" for name, (_, path) in found.items()}
    given = {name: value for name, value in (settings or {}).items() if value is not None}
    values |= given
    origins |= dict.fromkeys(given, origin)
    if "model" not in values:
        raise ConfigError(
            f"{view.place('').file or 'the configuration'} names no model: "
            "add trt_llm.build.checkpoint_repository, or model_metadata.headrace.model",
            param="trt_llm",
        )
    spec = make_spec(values, view.report, origin, origins)
    for gap, sentence in gaps(spec):
        key = found[gap.field][1] if gap.field in found and gap.field not in given else gap.field
        view.notice("not_yet" if gap.blocks else "differs", key, sentence)
    return Resolution(spec, view.report, str(view.get("resources.accelerator", "")), origins)


def make_spec(
    values: Mapping[str, Any],
    report: Report,
    origin: str = "argument",
    origins: Mapping[str, str] | None = None,
) -> EngineSpec:
    """Check settings in our own names and freeze them. Raises ConfigError with every problem.

    Nested settings may be mappings or the structs themselves.
    """
    reading = Reading(report)
    sources = origins or {}
    given = dict(values)
    if isinstance(given.get("environment"), tuple):  # as EngineSpec holds it
        given["environment"] = dict(given["environment"])
    node = _node(given)
    for name in node.value:
        node.key_places[name] = Place(sources.get(name, origin))
        node.value[name].place = node.key_places[name]
    read = OWN.read(node, "", reading)
    if read is not INVALID and read.get("model") is None and "model" not in reading.bad:
        report.problem("is required: a folder, GGUF file, packaged name or hub id", "model")
    report.raise_problems()
    return EngineSpec(**{name: _freeze(name, value) for name, value in read.items()})


def _freeze(name: str, value: Any) -> Any:
    if name == "speculation":
        return None if value is None else Speculation(**value)
    if name == "calibration":
        return Calibration(**value)
    if name == "adapters":
        return tuple(Adapter(**item) for item in value)
    if name == "environment":
        return tuple(sorted(value.items()))
    return tuple(value) if isinstance(value, list) else value


def _node(value: Any) -> Node:
    """Python data as a Node, so that one set of types checks everything."""
    if isinstance(value, msgspec.Struct):
        value = msgspec.structs.asdict(value)
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, Mapping):
        node = Node({str(key): _node(item) for key, item in value.items()}, Place())
        node.key_places = dict.fromkeys(node.value, Place())
        return node
    if isinstance(value, (list, tuple)):
        return Node([_node(item) for item in value], Place())
    return Node(value, Place(), "" if value is None else str(value))


def redacted(spec: EngineSpec) -> dict[str, Any]:
    """A specification for people: values of variables that look like credentials are hidden."""
    shown: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(spec, path=None))
    shown["path"] = None if spec.path is None else str(spec.path)
    shown["environment"] = hide_variables(dict(spec.environment))
    return shown
