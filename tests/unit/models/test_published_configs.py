"""config.json of encoders as they are published: every field that stands there is read or known not to matter."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.errors import UnsupportedCheckpoint
from headrace.models.encoder_families import encoder_family, read_encoder_config
from headrace.models.registry import read_config

BERT = {
    "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "classifier_dropout": None,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "hidden_size": 384, "initializer_range": 0.02, "intermediate_size": 1536,
    "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 12,
    "num_hidden_layers": 6, "pad_token_id": 0, "position_embedding_type": "absolute", "torch_dtype": "float32",
    "transformers_version": "4.45.2", "type_vocab_size": 2, "use_cache": True, "vocab_size": 30522,
    "gradient_checkpointing": False, "_name_or_path": "x",
}  # fmt: skip
XLMR = {
    **BERT, "architectures": ["XLMRobertaModel"], "model_type": "xlm-roberta", "max_position_embeddings": 8194,
    "type_vocab_size": 1, "vocab_size": 250002, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    "output_past": True, "layer_norm_eps": 1e-5,
}  # fmt: skip
NOMIC = {
    "activation_function": "swiglu", "architectures": ["NomicBertModel"], "attn_pdrop": 0.0,
    "auto_map": {"AutoModel": "x"},
    "bos_token_id": None, "causal": False, "dense_seq_output": True, "embd_pdrop": 0.0, "eos_token_id": None,
    "fused_bias_fc": True, "fused_dropout_add_ln": True, "initializer_range": 0.02, "layer_norm_epsilon": 1e-12,
    "max_trained_positions": 2048, "mlp_fc1_bias": False, "mlp_fc2_bias": False, "model_type": "nomic_bert",
    "n_embd": 768,
    "n_head": 12, "n_inner": 3072, "n_layer": 12, "n_positions": 8192, "pad_vocab_size_multiple": 64,
    "parallel_block": False, "parallel_block_tied_norm": False, "prenorm": False, "qkv_proj_bias": False,
    "reorder_and_upcast_attn": False, "resid_pdrop": 0.0, "rotary_emb_base": 1000, "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False, "rotary_emb_scale_base": None, "rotary_scaling_factor": None,
    "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True, "summary_activation": None,
    "summary_first_dropout": 0.0, "summary_proj_to_labels": True, "summary_type": "cls_index",
    "summary_use_proj": True,
    "type_vocab_size": 2, "use_flash_attn": True, "use_rms_norm": False, "use_xentropy": True, "vocab_size": 30528,
}  # fmt: skip
GTE = {
    "architectures": ["NewModel", "NewForTokenClassification"], "attention_probs_dropout_prob": 0.0,
    "auto_map": {"AutoModel": "x"}, "classifier_dropout": 0.0, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
    "hidden_size": 768, "id2label": {"0": "LABEL_0"}, "initializer_range": 0.02, "intermediate_size": 3072,
    "label2id": {"LABEL_0": 0}, "layer_norm_eps": 1e-12, "layer_norm_type": "layer_norm",
    "logn_attention_clip1": False,
    "logn_attention_scale": False, "max_position_embeddings": 8192, "model_type": "new", "num_attention_heads": 12,
    "num_hidden_layers": 12, "pack_qkv": True, "pad_token_id": 1, "position_embedding_type": "rope",
    "rope_scaling": {"factor": 8.0, "type": "ntk"}, "rope_theta": 20000, "torch_dtype": "float16",
    "type_vocab_size": 1,
    "unpad_inputs": False, "use_memory_efficient_attention": False, "vocab_size": 250048,
}  # fmt: skip
MODERN = {
    "architectures": ["ModernBertForMaskedLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 50281,
    "classifier_activation": "gelu", "classifier_bias": False, "classifier_dropout": 0.0,
    "classifier_pooling": "mean",
    "cls_token_id": 50281, "decoder_bias": True, "deterministic_flash_attn": False, "embedding_dropout": 0.0,
    "eos_token_id": 50282, "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0,
    "gradient_checkpointing": False,
    "hidden_activation": "gelu", "hidden_size": 768, "initializer_cutoff_factor": 2.0, "initializer_range": 0.02,
    "intermediate_size": 1152, "layer_norm_eps": 1e-05, "local_attention": 128, "local_rope_theta": 10000.0,
    "max_position_embeddings": 8192, "mlp_bias": False, "mlp_dropout": 0.0, "model_type": "modernbert",
    "norm_bias": False,
    "norm_eps": 1e-05, "num_attention_heads": 12, "num_hidden_layers": 22, "pad_token_id": 50283,
    "position_embedding_type": "absolute", "reference_compile": None, "repad_logits_with_grad": False,
    "sep_token_id": 50282, "sparse_pred_ignore_index": -100, "sparse_prediction": False, "tie_word_embeddings": True,
    "torch_dtype": "float32", "vocab_size": 50368,
}  # fmt: skip
JINA = {
    **BERT, "architectures": ["JinaBertForMaskedLM"], "model_max_length": 8192, "max_position_embeddings": 8192,
    "position_embedding_type": "alibi", "feed_forward_type": "geglu", "emb_pooler": "mean",
    "attn_implementation": "torch",
    "auto_map": {"AutoModel": "x"},
}  # fmt: skip
DISTIL = {
    "activation": "gelu", "architectures": ["DistilBertForMaskedLM"], "attention_dropout": 0.1, "dim": 768,
    "dropout": 0.1,
    "hidden_dim": 3072, "initializer_range": 0.02, "max_position_embeddings": 512, "model_type": "distilbert",
    "n_heads": 12, "n_layers": 6, "output_hidden_states": True, "output_past": True, "pad_token_id": 0,
    "qa_dropout": 0.1,
    "seq_classif_dropout": 0.2, "sinusoidal_pos_embds": False, "tie_weights_": True, "vocab_size": 119547,
}  # fmt: skip
EURO = {
    "architectures": ["EuroBertForMaskedLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"x": "y"},
    "bos_token": "<|begin_of_text|>", "clf_pooling": "late", "head_dim": 64, "hidden_act": "silu",
    "hidden_dropout": 0.0,
    "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072, "mask_token": "<|mask|>",
    "mask_token_id": 128002, "max_position_embeddings": 8192, "mlp_bias": False, "model_type": "eurobert",
    "num_attention_heads": 12, "num_hidden_layers": 12, "num_key_value_heads": 12, "pad_token": "<|end_of_text|>",
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 250000,
    "tie_word_embeddings": False,
    "use_cache": False, "vocab_size": 128256,
}  # fmt: skip
MANY_EXPERTS = {
    "activation_function": "gelu", "add_pooling_layer": False, "expert_choice_router": False, "ffn_div": 1,
    "mlp_fc1_bias": True, "mlp_fc2_bias": True, "moe_every_n_layers": 2, "moe_impl": "megablocks",
    "moe_normalize_expert_weights": False, "moe_resid_pdrop": 0.0, "moe_top_k": 2, "n_positions": 2048,
    "num_experts": 8,
    "num_shared_experts": 0, "qkv_proj_bias": True, "router_aux_loss_coef": 0.1, "type_vocab_size": 1,
    "use_rms_norm": None,
}  # fmt: skip
OLD_RERANKER = {
    "architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0},
    "sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity",
}  # fmt: skip
NEW_RERANKER = {
    "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.0.1"}
}
MULTILINGUAL = {
    "directionality": "bidi", "pooler_fc_size": 768, "pooler_num_attention_heads": 12, "pooler_num_fc_layers": 3,
    "pooler_size_per_head": 128, "pooler_type": "first_token_transform",
}  # fmt: skip
MPNET = {
    **{name: value for name, value in BERT.items() if name not in ("type_vocab_size", "position_embedding_type")},
    "model_type": "mpnet", "relative_attention_num_buckets": 32, "max_position_embeddings": 514, "pad_token_id": 1,
}  # fmt: skip
SNOWFLAKE = {
    "architectures": ["GteModel"], "model_type": "gte", "matryoshka_dimensions": [256], "rope_scaling": None,
    "rope_theta": 160000, "unpad_inputs": "true", "use_memory_efficient_attention": "true",
}  # fmt: skip
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {  # and the longest input
    "bert": (BERT, 512),
    "bert of many languages": (BERT | MULTILINGUAL, 512),
    "cross-encoder": (BERT | OLD_RERANKER, 512),
    "cross-encoder of later releases": (BERT | OLD_RERANKER | NEW_RERANKER, 512),
    "xlm-roberta of 8192": (XLMR, 8192),
    "mpnet": (MPNET, 512),
    "distilbert": (DISTIL, 512),
    "jina": (JINA, 8192),
    "nomic": (NOMIC, 8192),
    "nomic of experts": (NOMIC | MANY_EXPERTS, 2048),
    "gte": (GTE, 8192),
    "snowflake": (GTE | SNOWFLAKE, 8192),
    "modernbert": (MODERN, 8192),
    "eurobert": (EURO, 8192),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_is_read(name: str) -> None:
    config, longest = PUBLISHED[name]
    assert read_encoder_config(config, encoder_family(config)).max_tokens == longest


HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("nomic", {"rope_parameters": HALF}, "rope_parameters.partial_rotary_factor is 0.5"),
        ("nomic", {"rope_parameters": ["x"]}, "rope_parameters is .* expected an object"),
        ("nomic", {"rotary_emb_base": "x"}, "rotary_emb_base is 'x'"),
        ("eurobert", {"rope_parameters": HALF}, "rope_parameters.partial_rotary_factor is 0.5"),
        ("eurobert", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        ("eurobert", {"rope_parameters": {"rope_theta": -1.0}}, "rope_theta is -1.0"),
        ("modernbert", {"rope_parameters": {"full_attention": HALF}}, "full_attention.partial_rotary_factor"),
        (
            "modernbert",
            {"rope_parameters": {"rope_theta": 1e4}},
            "an object of full_attention and sliding_att",
        ),
        (
            "modernbert",
            {"layer_types": ["full_attention"]},
            "layer_types is .* expected 22 of full_attention",
        ),
        ("modernbert", {"layer_types": 1e300}, "layer_types is 1e"),
        ("modernbert", {"layer_types": ["full_attention", {}] * 11}, "layer_types is"),
    ],
)
def test_positions_that_are_turned_otherwise_are_refused(
    name: str, changes: dict[str, Any], message: str
) -> None:
    config = PUBLISHED[name][0] | changes
    with pytest.raises(UnsupportedCheckpoint, match=message):
        read_encoder_config(config, encoder_family(config))


def test_both_spellings_of_rotary_bases() -> None:
    new = {
        "full_attention": {"rope_type": "default", "rope_theta": 5e5},
        "sliding_attention": {"rope_theta": 2e4, "partial_rotary_factor": 1.0},
    }
    for changes in ({"rope_parameters": new}, {"global_rope_theta": 5e5, "local_rope_theta": 2e4}):
        declared = read_encoder_config(MODERN | changes, encoder_family(MODERN))
        assert declared.rope is not None and declared.local_rope is not None
        assert (declared.rope.theta, declared.local_rope.theta) == (5e5, 2e4)
    for config, base in ((NOMIC, {"rotary_emb_base": 3e4}), (EURO, {"rope_theta": 3e4})):
        for changes in (base, {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}}):
            declared = read_encoder_config(config | changes, encoder_family(config))
            assert declared.rope is not None and declared.rope.theta == 3e4


def test_gemma_2_states_its_window_twice() -> None:
    config = {
        "architectures": ["Gemma2Model"], "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 3584, "intermediate_size": 14336,
        "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 16, "num_hidden_layers": 42,
        "num_key_value_heads": 8, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
        "sliding_window": 4096, "sliding_window_size": 4096, "vocab_size": 256000,
    }  # fmt: skip
    assert read_config(config).windows[0] == 4096
    with pytest.raises(UnsupportedCheckpoint, match="sliding_window_size is 2048"):
        read_config({**config, "sliding_window_size": 2048})
