"""Qwen 3: Qwen 2 without biases, with a norm on every query and key head; dense, and with experts."""

from __future__ import annotations

from typing import Any

from headrace.models.declaration import DecoderConfig
from headrace.models.families.qwen2 import windows
from headrace.models.family import (
    FUSED_EXPERTS,
    Family,
    expert_names,
    qwen_experts,
    standard,
    standard_names,
)
from headrace.models.reading import ConfigReader


def read(config: ConfigReader) -> DecoderConfig:
    return _read(config, windows=windows(config))


def read_moe(config: ConfigReader) -> DecoderConfig:
    config.get("max_window_layers")  # stated, and meant for dense models: here all layers slide, or none
    window = config.integer("sliding_window", 4096) if config.flag("use_sliding_window") else None
    windows = (window,) * config.integer("num_hidden_layers")
    return _read(config, windows=windows, experts=qwen_experts(config))


def _read(config: ConfigReader, **choices: Any) -> DecoderConfig:
    bias = config.flag("attention_bias")
    return standard(config, qk_norm="head", qkv_bias=bias, output_bias=bias, **choices)


FAMILY = Family(
    architectures=("Qwen3ForCausalLM", "Qwen3Model"),
    read=read,
    names=standard_names(),
    defaults={"head_dim": 128},
)
MOE = Family(
    architectures=("Qwen3MoeForCausalLM", "Qwen3MoeModel"),
    read=read_moe,
    names={**standard_names(), **expert_names()},
    fused=FUSED_EXPERTS,
    defaults={"norm_topk_prob": False},
)
