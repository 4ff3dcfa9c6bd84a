"""Rotary embeddings out of `config.json`, in every spelling that transformers has used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

from headrace.errors import nearest
from headrace.layers.rope_config import RopeConfig, RopeKind
from headrace.models.reading import ConfigReader

__all__ = ["read_ropes"]

_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_ORIGINAL = "original_max_position_embeddings"
_KNOWN: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL},
    "yarn": {
        *("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        _ORIGINAL,
    },
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor", _ORIGINAL},
}
assert set(_KNOWN) == set(get_args(RopeKind))


def read_ropes(
    config: ConfigReader,
    head_dim: int,
    *,
    theta: float = 10_000.0,
    local_theta: float | None = None,
    aliases: Mapping[str, str] | None = None,
    partial: bool = False,
) -> tuple[RopeConfig, RopeConfig | None]:
    """The rotary embeddings of full-attention layers, and of sliding ones where they differ.

    Reads ``rope_theta`` with ``rope_scaling`` (transformers 4) and ``rope_parameters`` (transformers 5), the
    latter flat or by layer type, and Gemma 3's ``rope_local_base_freq``.

    Args:
        theta: the family's base where the file names none.
        local_theta: the same for sliding layers, in families that give these an embedding of their own.
        aliases: rope types that the family spells differently.
        partial: the family rotates only a part of each head where ``partial_rotary_factor`` says so. Others
            refuse such a factor: implementations of theirs disagree about it.
    """
    theta = config.number("rope_theta", theta)
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        raise config.refuse("rope_scaling", scaling, "an object")
    local: Mapping[str, Any] = {}
    if "full_attention" in scaling or "sliding_attention" in scaling:
        for name in scaling:
            if name not in ("full_attention", "sliding_attention"):
                raise config.refuse(
                    f"rope_parameters.{name}", scaling[name], "only layer types of this model"
                )
        local = scaling.get("sliding_attention") or {}
        scaling = scaling.get("full_attention") or {}
        if local_theta is None and dict(local) != dict(scaling):
            local_theta = theta
    if local_theta is not None:
        local_theta = config.number("rope_local_base_freq", local_theta)
    read = _RopeReader(config, head_dim, aliases or {}, partial)
    return read(scaling, theta), None if local_theta is None else read(local, local_theta)


class _RopeReader:
    """Resolves one rope dictionary."""

    def __init__(
        self, config: ConfigReader, head_dim: int, aliases: Mapping[str, str], partial: bool
    ) -> None:
        self.config, self.head_dim, self.aliases, self.may_be_partial = config, head_dim, aliases, partial
        self.partial = config.number("partial_rotary_factor", 1.0)
        self.context = config.integer("max_position_embeddings", 2048)
        self.original = config.get(_ORIGINAL)

    def __call__(self, rope: Mapping[str, Any], theta: float) -> RopeConfig:
        kind = rope.get("rope_type") or rope.get("type") or "default"
        kind = self.aliases.get(kind, kind) if isinstance(kind, str) else kind
        if not isinstance(kind, str) or kind not in _KNOWN:
            hint = nearest(str(kind), _KNOWN)
            raise self.config.refuse("rope_scaling.rope_type", kind, f"one of {sorted(_KNOWN)}{hint}")
        for name, value in rope.items():
            if value is not None and name not in _COMMON | _KNOWN[kind]:
                raise self.config.refuse(
                    f"rope_scaling.{name}", value, f"no such field with rope type {kind!r}"
                )
        theta = self._number(rope, "rope_theta", theta)
        factor = self._number(rope, "partial_rotary_factor", self.partial)
        if factor != 1 and not self.may_be_partial:
            raise self.config.refuse(
                "partial_rotary_factor", factor, "1 or none: this family rotates whole heads"
            )
        dim = int(self.head_dim * factor)
        if dim % 2 or not 0 < dim <= self.head_dim:
            expected = (
                f"one that gives an even number of rotated dimensions, not {dim} (partial_rotary_factor)"
            )
            raise self.config.refuse("head_dim", self.head_dim, expected)
        plain = RopeConfig(dim=dim, theta=theta)
        return plain if kind == "default" else _SCALINGS[kind](self, rope, plain)

    def _number(self, rope: Mapping[str, Any], name: str, default: float | None = None) -> float:
        value = rope.get(name)
        value = default if value is None else value
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
            or value < 0
        ):
            raise self.config.refuse(f"rope_scaling.{name}", value, "a finite number, not negative")
        return float(value)

    def _original(self, rope: Mapping[str, Any]) -> int:
        # Phi 3 keeps it beside the rope dictionary, and there it counts first.
        value = self.original or rope.get(_ORIGINAL) or self.context
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.config.refuse(_ORIGINAL, value, "a positive integer")
        return value

    def linear(self, rope: Mapping[str, Any], plain: RopeConfig) -> RopeConfig:
        return RopeConfig(
            dim=plain.dim, theta=plain.theta, kind="linear", factor=self._number(rope, "factor")
        )

    def dynamic(self, rope: Mapping[str, Any], plain: RopeConfig) -> RopeConfig:
        return RopeConfig(
            dim=plain.dim,
            theta=plain.theta,
            kind="dynamic",
            factor=self._number(rope, "factor"),
            original_length=self.context,
        )

    def llama3(self, rope: Mapping[str, Any], plain: RopeConfig) -> RopeConfig:
        return RopeConfig(
            dim=plain.dim,
            theta=plain.theta,
            kind="llama3",
            factor=self._number(rope, "factor"),
            low_freq_factor=self._number(rope, "low_freq_factor"),
            high_freq_factor=self._number(rope, "high_freq_factor"),
            original_length=self._original(rope),
        )

    def yarn(self, rope: Mapping[str, Any], plain: RopeConfig) -> RopeConfig:
        original = self._original(rope)
        factor = self._number(rope, "factor", self.context / original)

        def temperature(mscale: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

        mscale, mscale_all = self._number(rope, "mscale", 0.0), self._number(rope, "mscale_all_dim", 0.0)
        attention = (
            temperature(mscale) / temperature(mscale_all) if mscale and mscale_all else temperature(1.0)
        )
        truncate = rope.get("truncate", True)
        if not isinstance(truncate, bool):
            raise self.config.refuse("rope_scaling.truncate", truncate, "true or false")
        return RopeConfig(
            dim=plain.dim,
            theta=plain.theta,
            kind="yarn",
            factor=factor,
            original_length=original,
            attention_factor=self._number(rope, "attention_factor", attention),
            beta_fast=self._number(rope, "beta_fast", 32.0) or 32.0,
            beta_slow=self._number(rope, "beta_slow", 1.0) or 1.0,
            truncate=truncate,
        )

    def longrope(self, rope: Mapping[str, Any], plain: RopeConfig) -> RopeConfig:
        original = self._original(rope)
        factor = self._number(rope, "factor", self.context / original)
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        return RopeConfig(
            dim=plain.dim,
            theta=plain.theta,
            kind="longrope",
            factor=factor,
            original_length=original,
            attention_factor=self._number(rope, "attention_factor", attention),
            short_factors=self._factors(rope, "short_factor", plain.dim // 2),
            long_factors=self._factors(rope, "long_factor", plain.dim // 2),
        )

    def _factors(self, rope: Mapping[str, Any], name: str, count: int) -> tuple[float, ...]:
        values = rope.get(name)
        numbers = isinstance(values, list) and all(
            isinstance(value, int | float) and not isinstance(value, bool) for value in values
        )
        if values is None or not numbers or len(values) != count:
            raise self.config.refuse(f"rope_scaling.{name}", values, f"a list of {count} numbers")
        return tuple(float(value) for value in values)


_SCALINGS = {
    "linear": _RopeReader.linear,
    "dynamic": _RopeReader.dynamic,
    "llama3": _RopeReader.llama3,
    "yarn": _RopeReader.yarn,
    "longrope": _RopeReader.longrope,
}
