"""Qwen 2 and 2.5: Llama with biases on queries, keys and values; upper layers may slide."""

from __future__ import annotations

from headrace.models.declaration import DecoderConfig
from headrace.models.family import Family, layer_windows, standard, standard_names
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


FAMILY = Family(architectures=("Qwen2ForCausalLM", "Qwen2Model"), read=read, names=standard_names())
