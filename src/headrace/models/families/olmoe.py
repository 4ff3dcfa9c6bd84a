"""OLMoE (Muennighoff et al. 2024): Llama with experts, and norms over all queries and all keys."""

from __future__ import annotations

from headrace.models.declaration import DecoderConfig
from headrace.models.family import FUSED_EXPERTS, Family, expert_names, experts, standard, standard_names
from headrace.models.reading import ConfigReader


def read(config: ConfigReader) -> DecoderConfig:
    config.only("clip_qkv", [])
    bias = config.flag("attention_bias")
    mixture = experts(config, "num_experts", config.integer("intermediate_size"))
    return standard(config, qk_norm="full", qkv_bias=bias, output_bias=bias, norm_eps=1e-5, experts=mixture)


FAMILY = Family(
    architectures=("OlmoeForCausalLM", "OlmoeModel"),
    read=read,
    names={**standard_names(), **expert_names()},
    fused=FUSED_EXPERTS,
)
