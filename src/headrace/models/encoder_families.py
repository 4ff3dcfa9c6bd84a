"""Which encoder family reads which checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.errors import UnknownArchitecture, UnsupportedCheckpoint, nearest
from headrace.models.encoder_declaration import EncoderConfig
from headrace.models.encoder_family import EncoderFamily
from headrace.models.encoders.bert import BERT, ROBERTA
from headrace.models.encoders.distilbert import DISTILBERT
from headrace.models.encoders.eurobert import EUROBERT
from headrace.models.encoders.gte import GTE
from headrace.models.encoders.jina import JINA
from headrace.models.encoders.modernbert import MODERNBERT
from headrace.models.encoders.mpnet import MPNET
from headrace.models.encoders.nomic import NOMIC
from headrace.models.reading import ConfigReader

__all__ = ["ENCODER_FAMILIES", "encoder_family", "read_encoder_config"]

ENCODER_FAMILIES = (BERT, ROBERTA, DISTILBERT, MPNET, MODERNBERT, NOMIC, JINA, GTE, EUROBERT)


def encoder_family(config: Mapping[str, Any]) -> EncoderFamily:
    """The family of a `config.json`; raises UnknownArchitecture."""
    model_type = str(config.get("model_type", ""))
    if model_type == "bert" and config.get("position_embedding_type") == "alibi":
        model_type = "jina_bert"  # JinaBert calls itself bert
    for family in ENCODER_FAMILIES:
        if model_type in family.model_types:
            if family is JINA and "qk-post-norm" in _remote_code(config):
                raise UnsupportedCheckpoint(
                    "jina-bert-v2-qk-post-norm (queries and keys are normed) is not implemented",
                    param="auto_map",
                )
            return family
    known = [name for family in ENCODER_FAMILIES for name in family.model_types]
    raise UnknownArchitecture(
        f"no encoder family has model_type {model_type!r} (architectures {config.get('architectures')}); "
        f"known: {', '.join(sorted(set(known)))}{nearest(model_type, known)}",
        param="model_type",
    )


def _remote_code(config: Mapping[str, Any]) -> str:
    """Where the checkpoint's own modelling code would come from (never run; it tells variants apart)."""
    auto_map = config.get("auto_map")
    return " ".join(map(str, auto_map.values())) if isinstance(auto_map, Mapping) else ""


def read_encoder_config(config: Mapping[str, Any], family: EncoderFamily) -> EncoderConfig:
    """`config.json` as a declaration.

    Raises UnsupportedCheckpoint for a field that is missing, wrong, or means other arithmetic.
    """
    reader = ConfigReader(config, str(config.get("model_type")))
    for name in _HEAD_FIELDS.split():
        reader.get(name)
    declared = family.read(reader)
    reader.finish()
    return declared


# Fields that the heads read, or that are bookkeeping of one family.
_HEAD_FIELDS = """
    classifier_pooling clf_pooling classifier_bias classifier_activation tie_word_embeddings pooler_fc_size
    pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type directionality
    gradient_checkpointing output_past sbert_ce_default_activation_function sentence_transformers
    matryoshka_dimensions seq_classif_dropout qa_dropout emb_pooler tie_weights_ head_dim layer_types
    num_labels use_bfloat16 pruned_heads attention_dropout dim embedding_size
"""
