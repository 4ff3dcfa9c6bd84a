"""Mistral (Jiang et al. 2023): Llama with one sliding window on every layer; Mixtral (2024): with experts."""

from __future__ import annotations

from typing import Any

from headrace.models.declaration import DecoderConfig
from headrace.models.family import Family, expert_names, experts, standard, standard_names
from headrace.models.reading import ConfigReader


def read(config: ConfigReader, **choices: Any) -> DecoderConfig:
    config.only("attention_bias", [False])
    config.only("mlp_bias", [False])
    window = config.integer("sliding_window") if config.get("sliding_window") is not None else None
    # transformers runs a per-layer pattern under another class; the plain one would ignore it.
    config.only("layer_types", [])
    return standard(config, windows=(window,) * config.integer("num_hidden_layers"), **choices)


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
