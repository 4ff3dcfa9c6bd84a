"""Which family embeds, classifies or reranks with a checkpoint: an encoder, or a decoder without its head. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from headrace.errors import UnknownArchitecture, nearest
from headrace.models.encoder_families import ENCODER_FAMILIES, encoder_family, read_encoder_config
from headrace.models.registry import FAMILIES, read_config

__all__ = ["check_readable", "decoder_fields", "is_causal_family"]

_TASK = re.compile(
    r"(Bidirectional)?(Text)?(ForSequenceClassification|ForTokenClassification|ForRewardModel|ForCausalLM|Model)$"
)


def is_causal_family(config: Mapping[str, Any]) -> bool:
    """Whether the decoder reads this checkpoint; raises UnknownArchitecture when no model does."""
    if any(config.get("model_type") in family.model_types for family in ENCODER_FAMILIES):
        return False
    return bool(_decoder_architecture(config, head=False))


def decoder_fields(config: Mapping[str, Any], *, head: bool) -> tuple[dict[str, Any], bool]:
    """`config.json` as the decoder's family reads it, and whether every token sees all others.

    Args:
        head: keep the language-model head.
    Raises: UnknownArchitecture.
    """
    fields = dict(config)
    architecture = _decoder_architecture(fields, head=head)
    # How a checkpoint says that every token sees all others.
    says = fields.pop("is_causal", None)
    bidirectional = says is False or "Bidirectional" in str((fields.get("architectures") or [""])[0])
    fields["architectures"] = [architecture]
    for name in ("matryoshka_dimensions", "pooling", "score_bias", "sentence_transformers"):
        fields.pop(name, None)
    return fields, bidirectional


def check_readable(config: Mapping[str, Any], *, generates: bool) -> None:
    """Refuse, by the registries that `serve` asks, a configuration that no model reads.

    Args:
        config: `config.json` without what it says of quantization.
        generates: whether the model generates text; else it is run once over each text.
    Raises: UnknownArchitecture, UnsupportedCheckpoint, as loading would.
    """
    if generates:
        read_config(config)
    elif is_causal_family(config):
        read_config(decoder_fields(config, head=False)[0])
    else:
        read_encoder_config(config, encoder_family(config))


def _decoder_architecture(config: Mapping[str, Any], *, head: bool) -> str:
    """The registered decoder architecture under ``*ForSequenceClassification`` and the like."""
    name = str((config.get("architectures") or [""])[0])
    stem = _TASK.sub("", name)
    suffixes = ("ForCausalLM",) if head else ("Model", "TextModel")
    for suffix in suffixes:
        if stem + suffix in FAMILIES:
            return stem + suffix
    encoders = [kind for family in ENCODER_FAMILIES for kind in family.model_types]
    known = sorted({_TASK.sub("", known) for known in FAMILIES})
    raise UnknownArchitecture(
        f"no encoder and no decoder family has architecture {name!r} with model_type {config.get('model_type')!r}"
        f"{nearest(stem, known)}; encoders: {', '.join(sorted(encoders))}; decoders: {', '.join(known)}",
        param="architectures",
    )
