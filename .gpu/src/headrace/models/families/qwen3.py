"""Qwen 3: Qwen 2 without biases, with a norm on every query and key head."""

from __future__ import annotations

from headrace.models.declaration import DecoderConfig
from headrace.models.families.qwen2 import windows
from headrace.models.family import Family, standard, standard_names
from headrace.models.reading import ConfigReader


def read(config: ConfigReader) -> DecoderConfig:
    bias = config.flag("attention_bias")
    return standard(config, qk_norm="head", qkv_bias=bias, output_bias=bias, windows=windows(config))


FAMILY = Family(
    architectures=("Qwen3ForCausalLM", "Qwen3Model"),
    read=read,
    names=standard_names(),
    defaults={"head_dim": 128},
)
