"""ModernBERT (Warner et al. 2024): windows, rotary, GeGLU, norms before the blocks."""

from __future__ import annotations

from headrace.layers.rope_config import RopeConfig
from headrace.models.encoder_declaration import EncoderConfig
from headrace.models.encoder_family import EncoderFamily, Names, common_fields
from headrace.models.reading import ConfigReader

__all__ = ["MODERNBERT"]

_KINDS = ("full_attention", "sliding_attention")


def _modernbert(read: ConfigReader) -> EncoderConfig:
    common = common_fields(read)
    layers = common["num_layers"]
    every = read.integer("global_attn_every_n_layers", 3)
    kinds = read.get("layer_types") or [_KINDS[i % every != 0] for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in _KINDS for kind in kinds):
        raise read.refuse("layer_types", kinds, f"{layers} of {' and '.join(_KINDS)}")
    local = [kind == _KINDS[1] for kind in kinds]
    # local_attention counts both sides; a token sees half of it to each side.
    window = read.integer("local_attention", 128) // 2 + 1
    full, sliding = _modernbert_thetas(read)
    bias = read.flag("attention_bias")
    mlp_bias = read.flag("mlp_bias")
    for name in (
        "deterministic_flash_attn",
        "reference_compile",
        "repad_logits_with_grad",
        "sparse_prediction",
    ):
        read.get(name)
    for name in (
        "sparse_pred_ignore_index",
        "initializer_cutoff_factor",
        "decoder_bias",
        "embedding_dropout",
    ):
        read.get(name)
    for name in (
        "classifier_pooling",
        "classifier_bias",
        "classifier_activation",
        "mlp_dropout",
        "cls_token_id",
        # Published files state these two, which nothing reads: norm_eps counts, and positions are rotary.
        "layer_norm_eps",
        "position_embedding_type",
    ):
        read.get(name)
    return EncoderConfig(
        **common,
        max_tokens=read.integer("max_position_embeddings", 8192),
        rope=RopeConfig(dim=common["head_dim"], theta=full),
        local_rope=RopeConfig(dim=common["head_dim"], theta=sliding),
        windows=tuple(window if is_local else None for is_local in local),
        norm_eps=read.number("norm_eps", 1e-5),
        norm_bias=read.flag("norm_bias"),
        pre_norm=True,
        first_norm=False,
        qkv_bias=bias,
        output_bias=bias,
        gated=True,
        activation=read.activation("hidden_activation", default="gelu"),
        up_bias=mlp_bias,
        down_bias=mlp_bias,
    )


def _modernbert_thetas(read: ConfigReader) -> tuple[float, float]:
    """Rotary bases of full and of sliding layers, in the old spelling or the new."""
    bases = (read.positive("global_rope_theta", 160000.0), read.positive("local_rope_theta", 10000.0))
    parameters = read.get("rope_parameters") or {}
    if not isinstance(parameters, dict) or any(name not in _KINDS for name in parameters):
        raise read.refuse("rope_parameters", parameters, f"an object of {' and '.join(_KINDS)}")
    full, sliding = (
        read.plain_theta(f"rope_parameters.{kind}", parameters.get(kind), base)
        for kind, base in zip(_KINDS, bases)
    )
    return full, sliding


def _modernbert_names(config: EncoderConfig) -> Names:
    return {
        "word": ("embeddings.tok_embeddings",),
        "embedding_norm": ("embeddings.norm",),
        "layers.{i}.attention_norm": ("layers.{i}.attn_norm",),
        "layers.{i}.attention.qkv": ("layers.{i}.attn.Wqkv",),
        "layers.{i}.attention.o": ("layers.{i}.attn.Wo",),
        "layers.{i}.mlp_norm": ("layers.{i}.mlp_norm",),
        "layers.{i}.mlp.gate_up": ("layers.{i}.mlp.Wi",),
        "layers.{i}.mlp.down": ("layers.{i}.mlp.Wo",),
        "norm": ("final_norm",),
    }


MODERNBERT = EncoderFamily(("modernbert",), _modernbert, _modernbert_names)
