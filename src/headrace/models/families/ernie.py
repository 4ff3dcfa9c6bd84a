"""ERNIE 4.5 (Baidu 2025), its dense models: Llama whose rotary embedding turns neighbouring dimensions."""

from __future__ import annotations

from headrace.models.declaration import DecoderConfig
from headrace.models.family import Family, standard, standard_names
from headrace.models.reading import ConfigReader


def read(config: ConfigReader) -> DecoderConfig:
    bias = config.flag("use_bias")
    return standard(
        config,
        rope_neighbours=True,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        norm_eps=1e-5,
        tied=True,
    )


FAMILY = Family(
    architectures=("Ernie4_5ForCausalLM", "Ernie4_5Model"),
    read=read,
    names=standard_names(),
    defaults={"head_dim": 128, "num_key_value_heads": 2, "max_position_embeddings": 131_072},
)
