"""Granite 3: Llama with scaled embeddings, residuals, scores and logits (muP, Yang et al. 2022)."""

from __future__ import annotations

from headrace.models.declaration import DecoderConfig
from headrace.models.family import Family, standard, standard_names
from headrace.models.reading import ConfigReader


def read(config: ConfigReader) -> DecoderConfig:
    bias = config.flag("attention_bias")
    return standard(
        config,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=config.flag("mlp_bias"),
        embedding_scale=config.number("embedding_multiplier", 1.0),
        residual_multiplier=config.number("residual_multiplier", 1.0),
        attention_scale=config.number("attention_multiplier", 1.0),
        logits_divisor=config.number("logits_scaling", 1.0),
    )


FAMILY = Family(architectures=("GraniteForCausalLM", "GraniteModel"), read=read, names=standard_names())
