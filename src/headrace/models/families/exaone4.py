"""EXAONE 4 (LG AI Research 2025): norms on the outputs of the blocks; large ones slide, with no rotary embedding
on the layers that see all.
"""

from __future__ import annotations

from headrace.models.declaration import DecoderConfig
from headrace.models.family import Family, layer_windows, standard, standard_names
from headrace.models.reading import ConfigReader


def read(config: ConfigReader) -> DecoderConfig:
    windows = _windows(config)
    slides = any(window is not None for window in windows)
    nope = frozenset(i for i, window in enumerate(windows) if slides and window is None)
    return standard(
        config, norm_place="post", qk_norm="head", norm_eps=1e-5, windows=windows, no_rope_layers=nope
    )


def _windows(config: ConfigReader) -> tuple[int | None, ...]:
    """``layer_types``, or ``sliding_window_pattern``: every so many layers, or as its letters say, one sees all."""
    layers = config.integer("num_hidden_layers")
    window = config.integer("sliding_window") if config.get("sliding_window") is not None else None
    pattern = config.get("sliding_window_pattern")
    by_type = layer_windows(config, layers, window)
    if by_type is not None:
        # transformers takes away the rotary embedding wherever a window is stated, even where no layer uses it.
        if window is not None and all(each is None for each in by_type):
            raise config.refuse("sliding_window", window, "null where no layer of layer_types slides")
        return by_type
    if window is None:
        return (None,) * layers
    if isinstance(pattern, str) and pattern and set(pattern) <= set("LG"):
        sees_all = [pattern[i % len(pattern)] == "G" or i == layers - 1 for i in range(layers)]
    elif isinstance(pattern, int) and not isinstance(pattern, bool) and pattern > 0:
        sees_all = [(i + 1) % pattern == 0 for i in range(layers)]
    else:
        raise config.refuse("sliding_window_pattern", pattern, "a number of layers, or letters L and G")
    return tuple(None if full else window for full in sees_all)


FAMILY = Family(
    architectures=("Exaone4ForCausalLM", "Exaone4Model"),
    read=read,
    names=standard_names(
        post_attention_norm=("post_attention_layernorm",), post_mlp_norm=("post_feedforward_layernorm",)
    ),
)
