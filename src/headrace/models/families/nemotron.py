"""Nemotron 3 and 4, and Minitron (NVIDIA 2024): layer norms, squared ReLU, rotary embedding on half of each head."""

from __future__ import annotations

from headrace.models.declaration import DecoderConfig
from headrace.models.family import Family, standard, standard_names
from headrace.models.reading import ConfigReader
from headrace.models.rope import read_ropes


def read(config: ConfigReader) -> DecoderConfig:
    bias = config.flag("attention_bias")
    return standard(
        config,
        ropes=lambda head_dim: read_ropes(config, head_dim, partial=True),
        norm="layer_plus_one",
        norm_eps=config.number("norm_eps", 1e-5),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=config.flag("mlp_bias"),
        gated_mlp=False,
        activation=config.activation("hidden_act", default="relu2", gated=False),
    )


FAMILY = Family(
    architectures=("NemotronForCausalLM", "NemotronModel"),
    read=read,
    names=standard_names(mlp_up=("mlp.up_proj",)),
    defaults={"partial_rotary_factor": 0.5, "max_position_embeddings": 4096},
)
