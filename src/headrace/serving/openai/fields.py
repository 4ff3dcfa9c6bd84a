"""How a request field is declared: its type, what it does, and the row it gets in docs/api.md."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from headrace.serving.body import FieldError

__all__ = ["ApiModel", "acts", "harmless", "refused"]


def acts(default: Any, text: str, **limits: Any) -> Any:
    """A field that is acted on."""
    return Field(default, description=text, json_schema_extra={"effect": "acted on"}, **limits)


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
    _refusals: ClassVar[dict[str, tuple[list[Any], str]]] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        cls._refusals = {
            name: (list(cast("list[Any]", extra["allowed"])), info.description or "")
            for name, info in cls.model_fields.items()
            if isinstance(extra := info.json_schema_extra, dict) and extra.get("effect") == "refused"
        }

    @model_validator(mode="after")
    def _refuse(self) -> ApiModel:
        for name in self.model_fields_set & self._refusals.keys():
            value, (allowed, reason) = getattr(self, name), self._refusals[name]
            if value is not None and not any(value is one or value == one for one in allowed):
                raise FieldError(name, f"{name} is not supported: {reason}")
        return self
