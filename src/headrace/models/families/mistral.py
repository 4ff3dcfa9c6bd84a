"""Mistral (Jiang et al. 2023): Llama with one sliding window on every layer; Mixtral (2024): with experts;
Ministral (2024): with windows on some layers.
"""

from __future__ import annotations

from typing import Any

from headrace.models.declaration import DecoderConfig
from headrace.models.family import Family, expert_names, experts, layer_windows, standard, standard_names
from headrace.models.reading import ConfigReader


def read(config: ConfigReader, **choices: Any) -> DecoderConfig:
    config.only("attention_bias", [False])
    config.only("mlp_bias", [False])
    window = config.integer("sliding_window") if config.get("sliding_window") is not None else None
    # transformers runs a per-layer pattern under another class; the plain one would ignore it.
    config.only("layer_types", [])
    return standard(config, windows=(window,) * config.integer("num_hidden_layers"), **choices)


def read_ministral(config: ConfigReader) -> DecoderConfig:
    config.only("attention_bias", [False])
    config.only("mlp_bias", [False])
    layers = config.integer("num_hidden_layers")
    window = config.integer("sliding_window", 4096)
    if (
        config.get("layer_types") is None
    ):  # files of before transformers knew the family: the layers that slide differ
        raise config.refuse("layer_types", None, "the kind of each layer")
    return standard(config, windows=layer_windows(config, layers, window))


def read_moe(config: ConfigReader) -> DecoderConfig:
    size = config.integer("intermediate_size")
    return read(config, experts=experts(config, "num_local_experts", size, renormalize=True), norm_eps=1e-5)


FAMILY = Family(
    architectures=("MistralForCausalLM", "MistralModel"),
    read=read,
    names=standard_names(),
)
MIXTRAL = Family(
    architectures=("MixtralForCausalLM", "MixtralModel"),
    read=read_moe,
    names={**standard_names(), **expert_names("block_sparse_moe", parts=("w1", "w3", "w2"))},
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131_072},
)
MINISTRAL = Family(
    architectures=("MinistralForCausalLM", "MinistralModel"),
    read=read_ministral,
    names=standard_names(),
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131_072},
)
