"""GTE and Snowflake's "new" architecture (Zhang et al. 2024): rotary and gated units on BERT."""

from __future__ import annotations

from headrace.layers.rope_config import RopeConfig
from headrace.models.encoder_declaration import EncoderConfig
from headrace.models.encoder_family import EncoderFamily, Names, common_fields
from headrace.models.reading import ConfigReader

__all__ = ["GTE"]


def _gte(read: ConfigReader) -> EncoderConfig:
    read.only("position_embedding_type", ("rope",))
    read.only("layer_norm_type", ("layer_norm",))
    read.only("logn_attention_scale", (False,))
    for name in ("pack_qkv", "unpad_inputs", "use_memory_efficient_attention", "logn_attention_clip1"):
        read.get(name)
    read.get("tie_word_embeddings")
    common = common_fields(read)
    return EncoderConfig(
        **common,
        max_tokens=read.integer("max_position_embeddings", 8192),
        token_types=read.integer("type_vocab_size", 0, least=0),
        rope=_gte_rope(read, common["head_dim"]),
        norm_eps=read.number("layer_norm_eps", 1e-12),
        gated=True,
        activation=read.activation("hidden_act", default="gelu"),
        up_bias=False,
    )


def _gte_rope(read: ConfigReader, dim: int) -> RopeConfig:
    """Plain, or stretched by a fixed NTK factor f (Su 2023, kexue.fm/archives/9706).

    Frequencies are then (theta f)^(-2i/dim) / f^(2/dim): those of a larger base, and all of them a little lower.
    """
    parameters = read.get("rope_parameters") or {}
    theta = float(parameters.get("rope_theta") or read.get("rope_theta") or 160000.0)
    scaling = read.get("rope_scaling") or parameters
    kind = scaling.get("type") or scaling.get("rope_type") or "default"
    if kind == "default":
        return RopeConfig(dim=dim, theta=theta)
    factor = scaling.get("factor")
    known = {"type", "rope_type", "factor", "rope_theta"}
    if kind != "ntk" or not isinstance(factor, int | float) or factor < 1 or not known.issuperset(scaling):
        raise read.refuse("rope_scaling", scaling, 'null or {"type": "ntk", "factor": F} with F from 1 up')
    return RopeConfig(dim=dim, theta=theta * factor, kind="linear", factor=factor ** (2 / dim))


def _gte_names(config: EncoderConfig) -> Names:
    layer = "encoder.layer.{i}."
    return {
        "word": ("embeddings.word_embeddings",),
        "token_type": ("embeddings.token_type_embeddings",),
        "embedding_norm": ("embeddings.LayerNorm",),
        "layers.{i}.attention.qkv": (layer + "attention.qkv_proj",),
        "layers.{i}.attention.o": (layer + "attention.o_proj",),
        "layers.{i}.attention_norm": (layer + "attn_ln",),
        "layers.{i}.mlp.gate_up": (layer + "mlp.up_gate_proj",),
        "layers.{i}.mlp.down": (layer + "mlp.down_proj",),
        "layers.{i}.mlp_norm": (layer + "mlp_ln",),
    }


GTE = EncoderFamily(("new", "gte"), _gte, _gte_names, halves_swapped=frozenset({"layers.{i}.mlp.gate_up"}))
