"""GLM 4 (Zhipu AI 2024, as transformers spells it) and GLM 4 0414 (2025, with norms on both sides of the blocks)."""

from __future__ import annotations

from typing import Any

from headrace.models.declaration import DecoderConfig
from headrace.models.family import Family, standard, standard_names
from headrace.models.reading import ConfigReader
from headrace.models.rope import read_ropes

_FUSED = {"mlp_gate_up": ("mlp.gate_up_proj",)}
_DEFAULTS = {
    "head_dim": 128,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 131_072,
}


def read(config: ConfigReader, **choices: Any) -> DecoderConfig:
    return standard(
        config,
        ropes=lambda head_dim: read_ropes(config, head_dim, partial=True),
        rope_neighbours=True,
        qkv_bias=config.flag("attention_bias", True),
        norm_eps=1.5625e-7,
        **choices,
    )


def read_glm4(config: ConfigReader) -> DecoderConfig:
    return read(config, norm_place="sandwich")


FAMILY = Family(
    architectures=("GlmForCausalLM", "GlmModel"),
    read=read,
    names=standard_names(**_FUSED),
    defaults=_DEFAULTS,
)
GLM4 = Family(
    architectures=("Glm4ForCausalLM", "Glm4Model"),
    read=read_glm4,
    names=standard_names(
        **_FUSED,
        post_attention_norm=("post_self_attn_layernorm",),
        post_mlp_norm=("post_mlp_layernorm",),
    ),
    defaults=_DEFAULTS,
)
