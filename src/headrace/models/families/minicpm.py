"""MiniCPM 1, 2 and 4 (Hu et al. 2024): Llama with scaled embeddings, residuals and logits (muP), in its own words."""

from __future__ import annotations

from headrace.models.declaration import DecoderConfig
from headrace.models.family import Family, standard, standard_names
from headrace.models.reading import ConfigReader


def read(config: ConfigReader) -> DecoderConfig:
    layers, hidden = config.integer("num_hidden_layers"), config.integer("hidden_size")
    config.only("mup_denominator", [layers])  # stated by MiniCPM 4, and what scale_depth is divided by
    return standard(
        config,
        embedding_scale=config.number("scale_emb", 1.0),
        residual_multiplier=config.number("scale_depth", 1.0) / layers**0.5,
        logits_divisor=hidden / config.number("dim_model_base", 1.0),
        tied=True,
    )


FAMILY = Family(architectures=("MiniCPMForCausalLM",), read=read, names=standard_names())
