"""Qwen 2 and 2.5: Llama with biases on queries, keys and values; upper layers may slide. Dense, and with experts."""

from __future__ import annotations

from headrace.models.declaration import DecoderConfig
from headrace.models.family import (
    FUSED_EXPERTS,
    Family,
    expert_names,
    layer_windows,
    qwen_experts,
    standard,
    standard_names,
)
from headrace.models.reading import ConfigReader


def windows(config: ConfigReader) -> tuple[int | None, ...]:
    """``layer_types``, or ``sliding_window`` from layer ``max_window_layers`` on, when switched on at all."""
    layers = config.integer("num_hidden_layers")
    first = config.integer("max_window_layers", 28, least=0)
    sliding, window = config.flag("use_sliding_window"), config.get("sliding_window")
    window = config.integer("sliding_window", 4096) if sliding else None
    by_type = layer_windows(config, layers, window)
    return by_type or tuple(window if i >= first else None for i in range(layers))


def read(config: ConfigReader) -> DecoderConfig:
    config.only("attention_bias", [True])
    return standard(config, qkv_bias=True, windows=windows(config))


def read_moe(config: ConfigReader) -> DecoderConfig:
    if config.get("layer_types") is None:  # which layers slide differs between what wrote such files
        config.only("use_sliding_window", [False])
    bias = config.flag("qkv_bias", True)
    shared = config.integer("shared_expert_intermediate_size")
    experts = qwen_experts(config, shared_size=shared, shared_gate=True)
    return standard(config, qkv_bias=bias, windows=windows(config), experts=experts)


FAMILY = Family(architectures=("Qwen2ForCausalLM", "Qwen2Model"), read=read, names=standard_names())
MOE = Family(
    architectures=("Qwen2MoeForCausalLM", "Qwen2MoeModel"),
    read=read_moe,
    names={**standard_names(), **expert_names()},
    fused=FUSED_EXPERTS,
)
