"""Granite 3: Llama with scaled embeddings, residuals, scores and logits (muP, Yang et al. 2022). Also with experts."""

from __future__ import annotations

from typing import Any

from headrace.models.declaration import DecoderConfig
from headrace.models.family import Family, expert_names, experts, standard, standard_names
from headrace.models.reading import ConfigReader


def _read(config: ConfigReader, **choices: Any) -> DecoderConfig:
    bias = config.flag("attention_bias")
    return standard(
        config,
        qkv_bias=bias,
        output_bias=bias,
        embedding_scale=config.number("embedding_multiplier", 1.0),
        residual_multiplier=config.number("residual_multiplier", 1.0),
        attention_scale=config.number("attention_multiplier", 1.0),
        logits_divisor=config.number("logits_scaling", 1.0),
        **choices,
    )


def read(config: ConfigReader) -> DecoderConfig:
    return _read(config, mlp_bias=config.flag("mlp_bias"))


def read_moe(config: ConfigReader) -> DecoderConfig:
    size = config.integer("intermediate_size")
    return _read(config, experts=experts(config, "num_local_experts", size, renormalize=True))


FAMILY = Family(architectures=("GraniteForCausalLM", "GraniteModel"), read=read, names=standard_names())
MOE = Family(
    architectures=("GraniteMoeForCausalLM", "GraniteMoeModel"),
    read=read_moe,
    names={**standard_names(), **expert_names("block_sparse_moe", router="router.layer")},
    fused={
        "layers.{}.mlp.experts.gate_up": "layers.{}.block_sparse_moe.input_linear.weight",
        "layers.{}.mlp.experts.down": "layers.{}.block_sparse_moe.output_linear.weight",
    },
)
