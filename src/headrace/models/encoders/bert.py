"""BERT and RoBERTa (Devlin et al. 2019, Liu et al. 2019)."""

from __future__ import annotations

from headrace.models.encoder_declaration import EncoderConfig
from headrace.models.encoder_family import EncoderFamily, Names, common_fields
from headrace.models.reading import ConfigReader

__all__ = ["BERT", "ROBERTA", "bert_names"]


def _bert(read: ConfigReader) -> EncoderConfig:
    read.only("position_embedding_type", ("absolute",))
    read.only("is_decoder", (False,))
    read.only("add_cross_attention", (False,))
    positions = read.integer("max_position_embeddings", 512)
    return EncoderConfig(
        **common_fields(read),
        max_tokens=positions,
        positions=positions,
        token_types=read.integer("type_vocab_size", 2, least=0),
        norm_eps=read.number("layer_norm_eps", 1e-12),
        activation=read.activation("hidden_act", default="gelu"),
    )


def _roberta(read: ConfigReader) -> EncoderConfig:
    read.only("position_embedding_type", ("absolute",))
    read.only("is_decoder", (False,))
    read.only("add_cross_attention", (False,))
    # Positions are counted from the padding row on, so that many rows of the table are never used.
    positions = read.integer("max_position_embeddings", 514)
    offset = read.integer("pad_token_id", 1, least=0) + 1
    return EncoderConfig(
        **common_fields(read),
        max_tokens=positions - offset,
        positions=positions,
        position_offset=offset,
        token_types=read.integer("type_vocab_size", 1, least=0),
        norm_eps=read.number("layer_norm_eps", 1e-12),
        activation=read.activation("hidden_act", default="gelu"),
    )


def bert_names(config: EncoderConfig) -> Names:
    layer = "encoder.layer.{i}."
    return {
        "word": ("embeddings.word_embeddings",),
        "position": ("embeddings.position_embeddings",),
        "token_type": ("embeddings.token_type_embeddings",),
        "embedding_norm": ("embeddings.LayerNorm",),
        "layers.{i}.attention.qkv": tuple(f"{layer}attention.self.{x}" for x in ("query", "key", "value")),
        "layers.{i}.attention.o": (layer + "attention.output.dense",),
        "layers.{i}.attention_norm": (layer + "attention.output.LayerNorm",),
        "layers.{i}.mlp.up": (layer + "intermediate.dense",),
        "layers.{i}.mlp.down": (layer + "output.dense",),
        "layers.{i}.mlp_norm": (layer + "output.LayerNorm",),
    }


BERT = EncoderFamily(("bert",), _bert, bert_names)
ROBERTA = EncoderFamily(("roberta", "xlm-roberta", "camembert"), _roberta, bert_names)
