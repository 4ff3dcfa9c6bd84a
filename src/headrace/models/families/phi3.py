"""Phi 3, 3.5 and 4: Llama with fused projections in the checkpoint, partial rotary, LongRoPE."""

from __future__ import annotations

from headrace.models.declaration import DecoderConfig
from headrace.models.family import Family, standard, standard_names
from headrace.models.reading import ConfigReader
from headrace.models.rope import read_ropes


def read(config: ConfigReader) -> DecoderConfig:
    config.only("attention_bias", [False])
    config.only("mlp_bias", [False])
    window = config.integer("sliding_window") if config.get("sliding_window") is not None else None
    aliases = {"su": "longrope", "yarn": "longrope"}  # early names of the same thing in this family
    return standard(
        config,
        ropes=lambda head_dim: read_ropes(config, head_dim, aliases=aliases, partial=True),
        windows=(window,) * config.integer("num_hidden_layers"),
        norm_eps=1e-5,
    )


FAMILY = Family(
    architectures=("Phi3ForCausalLM", "Phi3Model"),
    read=read,
    names=standard_names(attention_qkv=("self_attn.qkv_proj",), mlp_gate_up=("mlp.gate_up_proj",)),
    defaults={"original_max_position_embeddings": 4096, "max_position_embeddings": 4096},
)
