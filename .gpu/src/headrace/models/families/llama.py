"""Llama (Touvron et al. 2023; Llama 3.x stretches its rotary embedding)."""

from __future__ import annotations

from headrace.models.declaration import DecoderConfig
from headrace.models.family import Family, standard, standard_names
from headrace.models.reading import ConfigReader


def read(config: ConfigReader) -> DecoderConfig:
    bias = config.flag("attention_bias")
    return standard(config, qkv_bias=bias, output_bias=bias, mlp_bias=config.flag("mlp_bias"))


FAMILY = Family(architectures=("LlamaForCausalLM", "LlamaModel"), read=read, names=standard_names())
