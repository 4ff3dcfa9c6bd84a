"""Mistral (Jiang et al. 2023): Llama with one sliding window on every layer."""

from __future__ import annotations

from headrace.models.declaration import DecoderConfig
from headrace.models.family import Family, standard, standard_names
from headrace.models.reading import ConfigReader


def read(config: ConfigReader) -> DecoderConfig:
    config.only("attention_bias", [False])
    config.only("mlp_bias", [False])
    window = config.integer("sliding_window") if config.get("sliding_window") is not None else None
    # transformers runs a per-layer pattern under another class; the plain one would ignore it.
    config.only("layer_types", [])
    return standard(config, windows=(window,) * config.integer("num_hidden_layers"))


FAMILY = Family(
    architectures=("MistralForCausalLM", "MistralModel"),
    read=read,
    names=standard_names(),
)
