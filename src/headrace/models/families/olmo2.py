"""OLMo 2 (2025): norms on the outputs of the blocks, and over all queries and all keys; OLMo 3: with windows."""

from __future__ import annotations

from typing import Any

from headrace.models.declaration import DecoderConfig
from headrace.models.family import Family, layer_windows, standard, standard_names
from headrace.models.reading import ConfigReader
from headrace.models.rope import read_ropes

_NAMES = standard_names(
    post_attention_norm=("post_attention_layernorm",), post_mlp_norm=("post_feedforward_layernorm",)
)


def read(config: ConfigReader, **choices: Any) -> DecoderConfig:
    bias = config.flag("attention_bias")
    return standard(
        config,
        norm_place="post",
        qk_norm="full",
        qkv_bias=bias,
        output_bias=bias,
        norm_eps=1e-5,
        **choices,
    )


def read_olmo3(config: ConfigReader) -> DecoderConfig:
    """A ``rope_scaling`` is for the layers that see all."""
    layers = config.integer("num_hidden_layers")
    window = config.integer("sliding_window", 4096)
    alternating = tuple(window if (i + 1) % 4 else None for i in range(layers))
    theta = config.number("rope_theta", 500_000.0)
    return read(
        config,
        ropes=lambda head_dim: read_ropes(config, head_dim, theta=theta, local_theta=theta),
        windows=layer_windows(config, layers, window) or alternating,
    )


FAMILY = Family(architectures=("Olmo2ForCausalLM", "Olmo2Model"), read=read, names=_NAMES)
OLMO3 = Family(architectures=("Olmo3ForCausalLM", "Olmo3Model"), read=read_olmo3, names=_NAMES)
