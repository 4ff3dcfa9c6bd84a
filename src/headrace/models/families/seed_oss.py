"""Seed-OSS (ByteDance 2025): Llama with biases on queries, keys and values."""

from __future__ import annotations

from headrace.models.declaration import DecoderConfig
from headrace.models.family import Family, standard, standard_names
from headrace.models.reading import ConfigReader


def read(config: ConfigReader) -> DecoderConfig:
    config.get("residual_dropout")  # of training
    return standard(
        config,
        qkv_bias=config.flag("attention_bias", True),
        output_bias=config.flag("attention_out_bias"),
        mlp_bias=config.flag("mlp_bias"),
    )


FAMILY = Family(
    architectures=("SeedOssForCausalLM", "SeedOssModel"),
    read=read,
    names=standard_names(),
    defaults={"head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 524_288},
)
