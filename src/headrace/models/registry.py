"""Which family reads which checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.errors import UnknownArchitecture, UnsupportedCheckpoint, nearest
from headrace.models.declaration import DecoderConfig
from headrace.models.families import (
    arcee,
    cohere,
    ernie,
    exaone4,
    gemma,
    glm,
    gpt_oss,
    granite,
    llama,
    minicpm,
    mistral,
    nemotron,
    olmo2,
    olmoe,
    phi3,
    qwen2,
    qwen3,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
)
from headrace.models.family import Family
from headrace.models.reading import ConfigReader

__all__ = ["FAMILIES", "family_of", "read_config"]

_ALL = (
    llama.FAMILY,
    llama.INTERNLM3,
    mistral.FAMILY,
    mistral.MIXTRAL,
    mistral.MINISTRAL,
    qwen2.FAMILY,
    qwen2.MOE,
    qwen3.FAMILY,
    qwen3.MOE,
    gemma.GEMMA,
    gemma.GEMMA2,
    gemma.GEMMA3,
    phi3.FAMILY,
    granite.FAMILY,
    granite.MOE,
    minicpm.FAMILY,
    olmo2.FAMILY,
    olmo2.OLMO3,
    olmoe.FAMILY,
    smollm3.FAMILY,
    gpt_oss.FAMILY,
    starcoder2.FAMILY,
    stablelm.FAMILY,
    exaone4.FAMILY,
    seed_oss.FAMILY,
    cohere.FAMILY,
    cohere.COHERE2,
    glm.FAMILY,
    glm.GLM4,
    ernie.FAMILY,
    nemotron.FAMILY,
    arcee.FAMILY,
)
FAMILIES: dict[str, Family] = {name: family for family in _ALL for name in family.architectures}


def family_of(config: Mapping[str, Any]) -> tuple[Family, str]:
    """The family and the architecture's name.

    Raises:
        UnknownArchitecture: `config.json` names none, or one that no family declares.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise UnknownArchitecture(
            f"config.json names no architecture (architectures is {names!r}); "
            f"expected one of {sorted(FAMILIES)}",
            param="architectures",
        )
    if names[0] not in FAMILIES:
        hint = nearest(names[0], FAMILIES) or f"; known are {', '.join(sorted(FAMILIES))}"
        raise UnknownArchitecture(
            f"no family declares the architecture {names[0]!r}{hint}", param="architectures"
        )
    return FAMILIES[names[0]], names[0]


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """`config.json` as a declaration.

    Raises:
        UnknownArchitecture: see family_of.
        UnsupportedCheckpoint: a field is missing, wrong, or means arithmetic that the family does not do.
    """
    family, architecture = family_of(config)
    fields = dict(config)
    if family.text_config is not None and isinstance(fields.get(family.text_config), Mapping):
        tied = fields.get("tie_word_embeddings")
        fields = dict(fields[family.text_config])
        if tied is not None:  # the outer file decides about the head
            fields["tie_word_embeddings"] = tied
    reader = ConfigReader(fields, architecture, family.defaults)
    if config.get("quantization_config") is not None:
        raise UnsupportedCheckpoint(
            f"config.json of {architecture}: quantization_config is {config['quantization_config']!r}; "
            "expected none, because the plain decoder reads unquantized weights only",
            param="quantization_config",
        )
    declared = family.read(reader)
    reader.finish()
    return declared
