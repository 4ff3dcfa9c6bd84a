"""How a request field is declared: its type, what it does, and the row it gets in docs/api.md."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from headrace.serving.body import FieldError

__all__ = ["ApiModel", "Many", "Numbers", "acts", "harmless", "needed", "refused"]

# Bodies may be megabytes, and the check runs on the event loop: one finding is reported, so one is looked for.
# A finding for each of a million wrong items would hold up every other request for half a minute.
T = TypeVar("T")
Many = Annotated[list[T], Field(fail_fast=True)]


def _first_wrong(value: Any) -> Any:
    """An object of numbers as it is; else only its first entry that is none."""
    if isinstance(value, dict):
        for key, one in value.items():
            if isinstance(one, bool) or not isinstance(one, (int, float)):
                return {key: one}
    return value


Numbers = Annotated[dict[str, float], BeforeValidator(_first_wrong)]


def acts(default: Any, text: str, **limits: Any) -> Any:
    """A field that is acted on."""
    return Field(default, description=text, json_schema_extra={"effect": "acted on"}, **limits)


def needed(text: str) -> Any:
    """A field without a default."""
    return Field(description=text, json_schema_extra={"effect": "acted on"})


def harmless(text: str) -> Any:
    """A field that is accepted and changes nothing."""
    return Field(None, description=text, json_schema_extra={"effect": "accepted, no effect"})


def refused(reason: str, *allowed: Any) -> Any:
    """A field that is refused by name with its reason, unless null or one of ``allowed``."""
    extra: dict[str, Any] = {"effect": "refused", "allowed": list(allowed)}
    return Field(None, description=reason, json_schema_extra=extra)


class ApiModel(BaseModel):
    """Base of request schemas: unknown fields refused, no silent conversions, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
    _known: ClassVar[frozenset[str]] = frozenset()
    _refusals: ClassVar[dict[str, tuple[list[Any], str]]] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        cls._known = frozenset(cls.model_fields)
        cls._refusals = {
            name: (list(cast("list[Any]", extra["allowed"])), info.description or "")
            for name, info in cls.model_fields.items()
            if isinstance(extra := info.json_schema_extra, dict) and extra.get("effect") == "refused"
        }

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, data: Any) -> Any:
        """The first unknown field is reported, so the others are not looked at."""
        if not isinstance(data, dict) or data.keys() <= cls._known:
            return data
        known = {name: value for name, value in data.items() if name in cls._known}
        unknown = next(name for name in data if name not in cls._known)
        return known | {unknown: data[unknown]}

    @model_validator(mode="after")
    def _refuse(self) -> ApiModel:
        for name in self.model_fields_set & self._refusals.keys() if self._refusals else ():
            value, (allowed, reason) = getattr(self, name), self._refusals[name]
            if value is not None and not any(value is one or value == one for one in allowed):
                raise FieldError(name, f"{name} is not supported: {reason}")
        return self
