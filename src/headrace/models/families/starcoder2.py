"""StarCoder 2 (Lozhkov et al. 2024): layer norms, biases everywhere, a plain feed-forward block."""

from __future__ import annotations

from headrace.models.declaration import DecoderConfig
from headrace.models.family import Family, standard, standard_names
from headrace.models.reading import ConfigReader


def read(config: ConfigReader) -> DecoderConfig:
    config.only("norm_type", ["layer_norm"])
    config.only("mlp_type", ["default"])
    config.get("residual_dropout")  # of training
    bias = config.flag("use_bias", True)
    window = config.integer("sliding_window") if config.get("sliding_window") is not None else None
    return standard(
        config,
        windows=(window,) * config.integer("num_hidden_layers"),
        norm="layer",
        norm_eps=config.number("norm_epsilon", 1e-5),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        gated_mlp=False,
        activation=config.activation("hidden_act", default="gelu_pytorch_tanh", gated=False),
        tied=True,
    )


FAMILY = Family(
    architectures=("Starcoder2ForCausalLM", "Starcoder2Model"),
    read=read,
    names=standard_names(mlp_up=("mlp.c_fc",), mlp_down=("mlp.c_proj",)),
    defaults={"num_key_value_heads": 2, "max_position_embeddings": 4096},
)
