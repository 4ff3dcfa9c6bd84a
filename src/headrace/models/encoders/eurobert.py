"""EuroBERT (Boizard et al. 2025): a bidirectional Llama."""

from __future__ import annotations

from headrace.layers.rope_config import RopeConfig
from headrace.models.encoder_declaration import EncoderConfig
from headrace.models.encoder_family import EncoderFamily, Names, common_fields
from headrace.models.reading import ConfigReader

__all__ = ["EUROBERT"]


def _eurobert(read: ConfigReader) -> EncoderConfig:
    common = common_fields(read)
    for name in ("tie_word_embeddings", "clf_pooling", "classifier_pooling", "mask_token_id"):
        read.get(name)
    common["num_kv_heads"] = read.integer("num_key_value_heads", common["num_heads"])
    common["head_dim"] = read.integer("head_dim", common["head_dim"])
    parameters = read.get("rope_parameters") or read.get("rope_scaling") or None
    theta = read.plain_theta("rope_parameters", parameters, read.positive("rope_theta", 10000.0))
    bias, mlp_bias = read.flag("attention_bias"), read.flag("mlp_bias")
    return EncoderConfig(
        **common,
        max_tokens=read.integer("max_position_embeddings", 8192),
        rope=RopeConfig(dim=common["head_dim"], theta=theta),
        norm="rms",
        norm_eps=read.number("rms_norm_eps", 1e-5),
        pre_norm=True,
        embedding_norm=False,
        qkv_bias=bias,
        output_bias=bias,
        gated=True,
        activation=read.activation("hidden_act", default="silu"),
        up_bias=mlp_bias,
        down_bias=mlp_bias,
    )


def _eurobert_names(config: EncoderConfig) -> Names:
    layer = "layers.{i}."
    return {
        "word": ("embed_tokens",),
        "layers.{i}.attention_norm": (layer + "input_layernorm",),
        "layers.{i}.attention.qkv": tuple(f"{layer}self_attn.{x}_proj" for x in "qkv"),
        "layers.{i}.attention.o": (layer + "self_attn.o_proj",),
        "layers.{i}.mlp_norm": (layer + "post_attention_layernorm",),
        "layers.{i}.mlp.gate_up": (layer + "mlp.gate_proj", layer + "mlp.up_proj"),
        "layers.{i}.mlp.down": (layer + "mlp.down_proj",),
        "norm": ("norm",),
    }


EUROBERT = EncoderFamily(("eurobert",), _eurobert, _eurobert_names)
