"""SmolLM 3 (2025): Llama with no rotary embedding on every fourth layer (NoPE, Yang et al. 2025)."""

from __future__ import annotations

from headrace.models.declaration import DecoderConfig
from headrace.models.family import Family, layer_windows, standard, standard_names
from headrace.models.reading import ConfigReader
from headrace.models.rope import read_ropes


def read(config: ConfigReader) -> DecoderConfig:
    layers = config.integer("num_hidden_layers")
    interval = config.integer("no_rope_layer_interval", 4)
    flags = config.get("no_rope_layers", [int((i + 1) % interval != 0) for i in range(layers)])
    if not isinstance(flags, list) or len(flags) != layers or any(flag not in (0, 1) for flag in flags):
        raise config.refuse(
            "no_rope_layers", flags, f"a list of {layers} zeros (no rotary embedding) and ones"
        )
    nope = frozenset(i for i, flag in enumerate(flags) if not flag)
    stated = config.get("sliding_window")
    window = (
        config.integer("sliding_window") if config.flag("use_sliding_window") and stated is not None else None
    )
    by_type = layer_windows(config, layers, window)
    bias = config.flag("attention_bias")
    return standard(
        config,
        ropes=lambda head_dim: read_ropes(config, head_dim, theta=2_000_000.0),
        windows=by_type or tuple(window if i in nope else None for i in range(layers)),
        no_rope_layers=nope,
        tied=True,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=config.flag("mlp_bias"),
    )


FAMILY = Family(architectures=("SmolLM3ForCausalLM", "SmolLM3Model"), read=read, names=standard_names())
