"""MPNet (Song et al. 2020): absolute positions and learned relative buckets."""

from __future__ import annotations

from headrace.models.encoder_declaration import EncoderConfig
from headrace.models.encoder_family import EncoderFamily, Names, common_fields
from headrace.models.encoders.bert import bert_names
from headrace.models.reading import ConfigReader

__all__ = ["MPNET"]


def _mpnet(read: ConfigReader) -> EncoderConfig:
    positions = read.integer("max_position_embeddings", 514)
    read.only("position_embedding_type", ("absolute",))
    return EncoderConfig(
        **common_fields(read),
        max_tokens=positions - 2,
        positions=positions,
        position_offset=2,
        distance_bias="buckets",
        num_buckets=read.integer("relative_attention_num_buckets", 32),
        norm_eps=read.number("layer_norm_eps", 1e-12),
        activation=read.activation("hidden_act", default="gelu"),
    )


def _mpnet_names(config: EncoderConfig) -> Names:
    names = bert_names(config)
    del names["token_type"]
    layer = "encoder.layer.{i}."
    names["bias"] = ("encoder.relative_attention_bias",)
    names["layers.{i}.attention.qkv"] = tuple(f"{layer}attention.attn.{x}" for x in "qkv")
    names["layers.{i}.attention.o"] = (layer + "attention.attn.o",)
    names["layers.{i}.attention_norm"] = (layer + "attention.LayerNorm",)
    return names


MPNET = EncoderFamily(("mpnet",), _mpnet, _mpnet_names)
