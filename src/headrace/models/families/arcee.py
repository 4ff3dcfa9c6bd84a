"""AFM (Arcee 2025): Llama with a plain feed-forward block and squared ReLU."""

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
        gated_mlp=False,
        activation=config.activation("hidden_act", default="relu2", gated=False),
        norm_eps=1e-5,
    )


FAMILY = Family(
    architectures=("ArceeForCausalLM", "ArceeModel"),
    read=read,
    names=standard_names(mlp_up=("mlp.up_proj",)),
    defaults={"max_position_embeddings": 4096},
)
