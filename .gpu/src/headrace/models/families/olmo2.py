"""OLMo 2 (2025): norms on the outputs of the blocks, and over all queries and all keys."""

from __future__ import annotations

from headrace.models.declaration import DecoderConfig
from headrace.models.family import Family, standard, standard_names
from headrace.models.reading import ConfigReader


def read(config: ConfigReader) -> DecoderConfig:
    bias = config.flag("attention_bias")
    return standard(config, norm_place="post", qk_norm="full", qkv_bias=bias, output_bias=bias, norm_eps=1e-5)


FAMILY = Family(
    architectures=("Olmo2ForCausalLM", "Olmo2Model"),
    read=read,
    names=standard_names(
        post_attention_norm=("post_attention_layernorm",), post_mlp_norm=("post_feedforward_layernorm",)
    ),
)
