"""Nomic BERT (Nussbaum et al. 2024) and its mixture of experts."""

from __future__ import annotations

from headrace.layers.rope_config import RopeConfig
from headrace.models.encoder_declaration import EncoderConfig
from headrace.models.encoder_family import EncoderFamily, Names
from headrace.models.reading import ACTIVATION_NAMES, ConfigReader

__all__ = ["NOMIC"]


# model_type nomic_bert has two spellings: the authors' (GPT-2's words) and that of transformers 5.
_NOMIC_WORDS = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "layer_norm_eps": "layer_norm_epsilon",
}
_NOMIC_HARMLESS = """
    dense_seq_output fused_bias_fc fused_dropout_add_ln pad_vocab_size_multiple parallel_block_tied_norm
    scale_attn_weights scale_attn_by_inverse_layer_idx reorder_and_upcast_attn summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj use_flash_attn use_xentropy
    max_trained_positions ffn_div moe_impl moe_resid_pdrop router_aux_loss_coef seq_parallel
    tie_word_embeddings head_dim
"""


def _nomic(read: ConfigReader) -> EncoderConfig:
    authors = read.get("n_embd") is not None
    word = _NOMIC_WORDS if authors else {name: name for name in _NOMIC_WORDS}
    read.only("prenorm", (False,))
    read.only("parallel_block", (False,))
    read.only("use_rms_norm", (False,))
    read.only("causal", (False,))
    read.only("rotary_emb_fraction", (1, 1.0))
    read.only("rotary_emb_interleaved", (False,))
    read.only("rotary_emb_scale_base", (None,))
    read.only("num_shared_experts", (0,))
    read.only("moe_normalize_expert_weights", (False,))
    read.only("expert_choice_router", (False,))
    for name in _NOMIC_HARMLESS.split():
        read.get(name)
    heads, hidden = read.integer(word["num_attention_heads"]), read.integer(word["hidden_size"])
    layers = read.integer(word["num_hidden_layers"])
    act = read.get("activation_function") or read.get("hidden_act") or "swiglu"
    gated = act in ("swiglu", "geglu", "glu") or not authors
    inner = read.integer(word["intermediate_size"])
    bias = read.flag("qkv_proj_bias")
    every = read.get("moe_every_n_layers") or 0
    experts = frozenset(i for i in range(layers) if every and i % every == 1)
    if act not in ("swiglu", "geglu", *ACTIVATION_NAMES):
        raise read.refuse("activation_function", act, "swiglu, geglu or gelu")
    return EncoderConfig(
        vocab_size=read.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=inner,
        max_tokens=read.integer(word["max_position_embeddings"], 2048),
        token_types=read.integer("type_vocab_size", 2, least=0),
        rope=_nomic_rope(read, hidden // heads),
        norm_eps=read.number(word["layer_norm_eps"], 1e-12),
        qkv_bias=bias,
        output_bias=bias,
        gated=gated,
        activation={"swiglu": "silu", "geglu": "gelu"}.get(act) or ACTIVATION_NAMES[act],
        up_bias=read.flag("mlp_fc1_bias"),
        down_bias=read.flag("mlp_fc2_bias"),
        experts=read.integer("num_experts", 0, least=1 if experts else 0),
        experts_per_token=read.integer("moe_top_k", 1, least=0),
        expert_layers=experts,
    )


def _nomic_rope(read: ConfigReader, dim: int) -> RopeConfig:
    base = read.positive("rotary_emb_base", 1000.0)
    theta = read.plain_theta("rope_parameters", read.get("rope_parameters"), base)
    if read.get("rotary_scaling_factor"):
        # The authors stretch by dynamic NTK beyond the trained length; below it nothing changes.
        raise read.refuse("rotary_scaling_factor", read.get("rotary_scaling_factor"), "null (no stretching)")
    return RopeConfig(dim=dim, theta=theta)


def _nomic_names(config: EncoderConfig) -> Names:
    layer = "encoder.layers.{i}."
    return {
        "word": ("embeddings.word_embeddings",),
        "token_type": ("embeddings.token_type_embeddings",),
        "embedding_norm": ("emb_ln",),
        "layers.{i}.attention.qkv": (layer + "attn.Wqkv",),
        "layers.{i}.attention.o": (layer + "attn.out_proj",),
        "layers.{i}.attention_norm": (layer + "norm1",),
        "layers.{i}.mlp.gate_up": (layer + "mlp.fc12", layer + "mlp.fc11"),
        "layers.{i}.mlp.up": (layer + "mlp.fc1",),
        "layers.{i}.mlp.down": (layer + "mlp.fc2",),
        "layers.{i}.mlp.router": (layer + "mlp.router.layer",),
        "layers.{i}.mlp_norm": (layer + "norm2",),
        # Whole tensors of the experts, without .weight.
        "layers.{i}.mlp|up": (layer + "mlp.experts.mlp.w1",),
        "layers.{i}.mlp|down": (layer + "mlp.experts.mlp.w2",),
        "layers.{i}.mlp|bias": (layer + "mlp.experts.bias",),
    }


NOMIC = EncoderFamily(("nomic_bert",), _nomic, _nomic_names)
