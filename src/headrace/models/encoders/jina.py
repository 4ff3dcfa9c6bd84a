"""Jina v2 (Günther et al. 2023): ALiBi and gated units on BERT."""

from __future__ import annotations

from headrace.models.encoder_declaration import EncoderConfig
from headrace.models.encoder_family import EncoderFamily, Names, common_fields
from headrace.models.encoders.bert import bert_names
from headrace.models.reading import ConfigReader

__all__ = ["JINA"]


def _jina(read: ConfigReader) -> EncoderConfig:
    read.only("is_decoder", (False,))
    for name in ("attn_implementation", "emb_pooler", "feed_forward_type"):
        read.get(name)
    if read.get("position_embedding_type") != "alibi":
        raise read.refuse("position_embedding_type", read.get("position_embedding_type"), "'alibi'")
    read.only("feed_forward_type", ("geglu", "reglu"))
    activation = "relu" if read.get("feed_forward_type") == "reglu" else "gelu"
    read.get("hidden_act")
    return EncoderConfig(
        **common_fields(read),
        max_tokens=read.integer("max_position_embeddings", 8192),
        token_types=read.integer("type_vocab_size", 2, least=0),
        distance_bias="alibi",
        norm_eps=read.number("layer_norm_eps", 1e-12),
        gated=True,
        activation=activation,
        up_bias=False,
    )


def _jina_names(config: EncoderConfig) -> Names:
    names = bert_names(config)
    del names["position"], names["layers.{i}.mlp.up"]
    layer = "encoder.layer.{i}."
    names["layers.{i}.mlp.gate_up"] = (layer + "mlp.gated_layers",)
    names["layers.{i}.mlp.down"] = (layer + "mlp.wo",)
    names["layers.{i}.mlp_norm"] = (layer + "mlp.layernorm",)
    return names


JINA = EncoderFamily(("jina_bert",), _jina, _jina_names)
