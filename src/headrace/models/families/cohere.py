"""Command R (Cohere 2024) and Command R7B and A (2025): attention and feed-forward side by side, after one norm."""

from __future__ import annotations

from typing import Any

from headrace.models.declaration import DecoderConfig
from headrace.models.family import Family, layer_windows, standard, standard_names
from headrace.models.reading import ConfigReader

_NAMES = standard_names()
_DEFAULTS = {"max_position_embeddings": 8192}
# What published files of Command R7B state about how the family is built.
_STATED = {
    "order_of_interleaved_layers": "local_attn_first",
    "position_embedding_type": "rope_gptj",
    "rotary_pct": 1.0,
    "use_embedding_sharing": True,
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_parallel_embedding": False,
}


def _read(config: ConfigReader, **choices: Any) -> DecoderConfig:
    scale = config.number("logit_scale", 0.0625)
    if scale <= 0:
        raise config.refuse("logit_scale", scale, "a positive number")
    bias = config.flag("attention_bias")
    return standard(
        config,
        norm="layer",
        norm_bias=False,
        norm_place="parallel",
        norm_eps=config.number("layer_norm_eps", 1e-5),
        rope_neighbours=True,
        qkv_bias=bias,
        output_bias=bias,
        logits_divisor=1 / scale,
        tied=True,
        **choices,
    )


def read(config: ConfigReader) -> DecoderConfig:
    config.only("use_qk_norm", [False])  # of Command R+, layer norms with weights for each head
    return _read(config)


def read_cohere2(config: ConfigReader) -> DecoderConfig:
    """Layers that see all have no rotary embedding."""
    for name, value in _STATED.items():
        config.only(name, [value])
    layers = config.integer("num_hidden_layers")
    pattern = config.integer("sliding_window_pattern", config.integer("_sliding_window_pattern", 4))
    config.only("layer_switch", [pattern])
    window = config.integer("sliding_window", 4096)
    alternating = tuple(window if (i + 1) % pattern else None for i in range(layers))
    windows = layer_windows(config, layers, window) or alternating
    nope = frozenset(i for i, each in enumerate(windows) if each is None)
    return _read(config, windows=windows, no_rope_layers=nope)


FAMILY = Family(
    architectures=("CohereForCausalLM", "CohereModel"), read=read, names=_NAMES, defaults=_DEFAULTS
)
COHERE2 = Family(
    architectures=("Cohere2ForCausalLM", "Cohere2Model"), read=read_cohere2, names=_NAMES, defaults=_DEFAULTS
)
