"""Llama (Touvron et al. 2023; Llama 3.x stretches its rotary embedding), and InternLM 3 (2025) in its own words."""

from __future__ import annotations

from headrace.models.declaration import DecoderConfig
from headrace.models.family import Family, standard, standard_names
from headrace.models.reading import ConfigReader


def read(config: ConfigReader) -> DecoderConfig:
    bias = config.flag("attention_bias")
    return standard(config, qkv_bias=bias, output_bias=bias, mlp_bias=config.flag("mlp_bias"))


def read_internlm3(config: ConfigReader) -> DecoderConfig:
    bias = config.flag("bias")
    return standard(config, qkv_bias=config.flag("qkv_bias"), output_bias=bias, mlp_bias=bias, norm_eps=1e-5)


FAMILY = Family(architectures=("LlamaForCausalLM", "LlamaModel"), read=read, names=standard_names())
INTERNLM3 = Family(
    architectures=("InternLM3ForCausalLM", "InternLM3Model"),
    read=read_internlm3,
    names=standard_names(),
    defaults={"head_dim": 128, "num_key_value_heads": 2, "max_position_embeddings": 32_768},
)
