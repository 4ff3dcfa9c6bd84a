"""DistilBERT (Sanh et al. 2019)."""

from __future__ import annotations

from headrace.models.encoder_declaration import EncoderConfig
from headrace.models.encoder_family import EncoderFamily, Names
from headrace.models.reading import ConfigReader

__all__ = ["DISTILBERT"]


def _distilbert(read: ConfigReader) -> EncoderConfig:
    positions = read.integer("max_position_embeddings", 512)
    heads, hidden = read.integer("n_heads", 12), read.integer("dim", 768)
    read.get("sinusoidal_pos_embds")  # the checkpoint stores the table either way
    return EncoderConfig(
        vocab_size=read.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=read.integer("n_layers", 6),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=read.integer("hidden_dim", 3072),
        max_tokens=positions,
        positions=positions,
        norm_eps=1e-12,
        activation=read.activation("activation", default="gelu"),
    )


def _distilbert_names(config: EncoderConfig) -> Names:
    layer = "transformer.layer.{i}."
    return {
        "word": ("embeddings.word_embeddings",),
        "position": ("embeddings.position_embeddings",),
        "embedding_norm": ("embeddings.LayerNorm",),
        "layers.{i}.attention.qkv": tuple(f"{layer}attention.{x}_lin" for x in "qkv"),
        "layers.{i}.attention.o": (layer + "attention.out_lin",),
        "layers.{i}.attention_norm": (layer + "sa_layer_norm",),
        "layers.{i}.mlp.up": (layer + "ffn.lin1",),
        "layers.{i}.mlp.down": (layer + "ffn.lin2",),
        "layers.{i}.mlp_norm": (layer + "output_layer_norm",),
    }


DISTILBERT = EncoderFamily(("distilbert",), _distilbert, _distilbert_names)
