"""Gemma, Gemma 2 (soft caps), Gemma 3 (query and key norms, a rotary embedding of its own for sliding layers)."""

from __future__ import annotations

from typing import Any

from headrace.models.declaration import DecoderConfig
from headrace.models.family import Family, layer_windows, standard, standard_names
from headrace.models.reading import ConfigReader
from headrace.models.rope import read_ropes

_NAMES = standard_names(
    post_attention_norm=("post_attention_layernorm",),
    mlp_norm=("pre_feedforward_layernorm",),
    post_mlp_norm=("post_feedforward_layernorm",),
)
_DEFAULTS: dict[str, Any] = {"head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 4}


def _read(config: ConfigReader, pattern: int, **choices: Any) -> DecoderConfig:
    """Sandwich norms of 1 + weight, scaled embeddings, every ``pattern``-th layer with full attention."""
    layers = config.integer("num_hidden_layers")
    window = config.integer("sliding_window", 4096)
    config.only("sliding_window_size", [None, window])  # Gemma 2's files state it twice
    bidirectional = config.flag("use_bidirectional_attention")
    if bidirectional:  # such checkpoints state the window's whole width
        window = window // 2 + 1
    alternating = tuple(window if (i + 1) % pattern else None for i in range(layers))
    bias = config.flag("attention_bias")
    return standard(
        config,
        windows=layer_windows(config, layers, window) or alternating,
        tied=True,
        norm="rms_plus_one",
        norm_place="sandwich",
        qkv_bias=bias,
        output_bias=bias,
        activation=config.activation("hidden_activation", default="gelu_pytorch_tanh"),
        embedding_scale=config.integer("hidden_size") ** 0.5,
        attention_scale=config.positive("query_pre_attn_scalar", 256) ** -0.5,
        logit_soft_cap=config.optional_number("final_logit_softcapping"),
        causal=not bidirectional,
        **choices,
    )


def read_gemma(config: ConfigReader) -> DecoderConfig:
    """Norms before the blocks; an activation of ``gelu`` was always the approximation by tanh."""
    config.only("use_bidirectional_attention", [False])
    bias = config.flag("attention_bias")
    stated = config.activation("hidden_activation", "hidden_act", default="gelu_pytorch_tanh")
    return standard(
        config,
        tied=True,
        norm="rms_plus_one",
        qkv_bias=bias,
        output_bias=bias,
        activation="gelu_tanh" if stated == "gelu" else stated,
        embedding_scale=config.integer("hidden_size") ** 0.5,
    )


def read_gemma2(config: ConfigReader) -> DecoderConfig:
    config.get("hidden_act")  # stated by some files, and overruled by hidden_activation
    config.only("use_bidirectional_attention", [False])  # Gemma 3's; Gemma 2 always masks causally
    return _read(config, 2, attention_soft_cap=config.optional_number("attn_logit_softcapping"))


def read_gemma3(config: ConfigReader) -> DecoderConfig:
    config.get("hidden_act")
    # The field is inherited and Gemma 3's attention does not apply it; a set one would be a different model.
    config.only("attn_logit_softcapping", [])
    pattern = config.integer("sliding_window_pattern", config.integer("_sliding_window_pattern", 6))
    return _read(
        config,
        pattern,
        qk_norm="head",
        ropes=lambda head_dim: read_ropes(config, head_dim, theta=1_000_000.0, local_theta=10_000.0),
    )


GEMMA = Family(
    architectures=("GemmaForCausalLM", "GemmaModel"),
    read=read_gemma,
    names=standard_names(),
    defaults={"head_dim": 256, "num_key_value_heads": 16, "max_position_embeddings": 8192},
)
GEMMA2 = Family(
    architectures=("Gemma2ForCausalLM", "Gemma2Model"),
    read=read_gemma2,
    names=_NAMES,
    defaults={**_DEFAULTS, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
)
GEMMA3 = Family(
    architectures=("Gemma3ForCausalLM", "Gemma3TextModel", "Gemma3ForConditionalGeneration"),
    read=read_gemma3,
    names=_NAMES,
    defaults={**_DEFAULTS, "vocab_size": 262_208},
    text_config="text_config",
    ignored=(
        "vision_tower.",
        "multi_modal_projector.",
        "model.vision_tower.",
        "model.multi_modal_projector.",
    ),
)
