"""gpt-oss (OpenAI 2025): experts with clamped gates, attention with learned sinks, every second layer sliding."""

from __future__ import annotations

from headrace.models.arrangement import Stacked
from headrace.models.declaration import DecoderConfig, ExpertsConfig
from headrace.models.family import (
    FUSED_EXPERTS,
    Family,
    expert_names,
    layer_windows,
    standard,
    standard_names,
)
from headrace.models.reading import ConfigReader
from headrace.models.rope import read_ropes


def read(config: ConfigReader) -> DecoderConfig:
    layers = config.integer("num_hidden_layers")
    window = config.integer("sliding_window", 128)
    alternating = tuple(None if i % 2 else window for i in range(layers))
    if not (config.get("rope_scaling") or config.get("rope_parameters")):
        raise config.refuse(
            "rope_scaling", None, "the rotary embedding that the model was trained with (yarn)"
        )
    config.get("initial_context_length")  # rope_scaling's original_max_position_embeddings, once more
    bias = config.flag("attention_bias", True)
    return standard(
        config,
        ropes=lambda head_dim: read_ropes(config, head_dim, theta=150_000.0),
        windows=layer_windows(config, layers, window) or alternating,
        norm_eps=1e-5,
        qkv_bias=bias,
        output_bias=bias,
        sinks=True,
        experts=_experts(config),
    )


def _experts(config: ConfigReader) -> ExpertsConfig:
    config.only("hidden_act", ["silu", "swish"])
    config.only("swiglu_alpha", [1.702])
    config.only("swiglu_limit", [7.0])
    count = config.integer("num_local_experts", config.get("num_experts"))
    chosen = config.integer("num_experts_per_tok", config.get("experts_per_token"))
    config.only("num_experts", [count])
    config.only("experts_per_token", [chosen])
    if chosen > count:
        raise config.refuse("num_experts_per_tok", chosen, f"at most num_local_experts ({count})")
    for training in ("router_aux_loss_coef", "output_router_logits"):
        config.get(training)
    return ExpertsConfig(
        num_experts=count,
        experts_per_token=chosen,
        intermediate_size=config.integer("intermediate_size"),
        renormalize=True,
        router_bias=True,
        bias=True,
        activation="clamped_swiglu",
    )


FAMILY = Family(
    architectures=("GptOssForCausalLM", "GptOssModel"),
    read=read,
    names={
        **standard_names(),
        "layers.{}.attention": ("layers.{}.self_attn",),  # sinks
        **expert_names(router="router"),
    },
    fused=FUSED_EXPERTS,
    stacked={
        "layers.{}.mlp.experts.gate_up": Stacked(transposed=True, interleaved=True),
        "layers.{}.mlp.experts.down": Stacked(transposed=True),
    },
    turn_ends=("<|return|>", "<|call|>"),  # of harmony; files that were saved anew may name the first alone
    defaults={"head_dim": 64, "max_position_embeddings": 131_072},
)
