"""Encoder families as data: how each reads its `config.json`, and what its checkpoints call the weights.

A table of names maps our modules to the checkpoint's, whose ``.weight`` and ``.bias`` follow. Sources are
stacked by rows (query, key, value). ``{i}`` is the layer. The prefix (``bert.``, ``model.``, ...) is found by
looking where the word table lies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from headrace.errors import UnknownArchitecture, UnsupportedCheckpoint, nearest
from headrace.layers.rotary import RopeConfig
from headrace.models.encoder import EncoderConfig
from headrace.models.reading import ACTIVATION_NAMES, ConfigReader

__all__ = ["ENCODER_FAMILIES", "EncoderFamily", "encoder_family", "read_encoder_config"]

Names = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class EncoderFamily:
    """One family.

    Attributes:
        model_types: values of ``model_type`` in `config.json`.
        read: `config.json` to the declaration.
        names: the table; a callable where it depends on the declaration.
        halves_swapped: modules whose two stacked halves lie in the other order in the checkpoint.
    """

    model_types: tuple[str, ...]
    read: Callable[[ConfigReader], EncoderConfig]
    names: Callable[[EncoderConfig], Names]
    halves_swapped: frozenset[str] = frozenset()


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


def _common(read: ConfigReader, **other: Any) -> dict[str, Any]:
    """Fields that BERT's descendants spell alike."""
    heads, hidden = read.integer("num_attention_heads"), read.integer("hidden_size")
    if hidden % heads:
        raise read.refuse("num_attention_heads", heads, f"a divisor of hidden_size {hidden}")
    return {
        "vocab_size": read.integer("vocab_size"),
        "hidden_size": hidden,
        "num_layers": read.integer("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "intermediate_size": read.integer("intermediate_size"),
        **other,
    }


# --- BERT and RoBERTa (Devlin et al. 2019, Liu et al. 2019) ---------------------------------------------


def _bert(read: ConfigReader) -> EncoderConfig:
    read.only("position_embedding_type", ("absolute",))
    read.only("is_decoder", (False,))
    read.only("add_cross_attention", (False,))
    positions = read.integer("max_position_embeddings", 512)
    return EncoderConfig(
        **_common(read),
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
        **_common(read),
        max_tokens=positions - offset,
        positions=positions,
        position_offset=offset,
        token_types=read.integer("type_vocab_size", 1, least=0),
        norm_eps=read.number("layer_norm_eps", 1e-12),
        activation=read.activation("hidden_act", default="gelu"),
    )


def _bert_names(config: EncoderConfig) -> Names:
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


BERT = EncoderFamily(("bert",), _bert, _bert_names)
ROBERTA = EncoderFamily(("roberta", "xlm-roberta", "camembert"), _roberta, _bert_names)


# --- DistilBERT (Sanh et al. 2019) ----------------------------------------------------------------------


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


# --- MPNet (Song et al. 2020): absolute positions and learned relative buckets ----------------------------


def _mpnet(read: ConfigReader) -> EncoderConfig:
    positions = read.integer("max_position_embeddings", 514)
    return EncoderConfig(
        **_common(read),
        max_tokens=positions - 2,
        positions=positions,
        position_offset=2,
        distance_bias="buckets",
        num_buckets=read.integer("relative_attention_num_buckets", 32),
        norm_eps=read.number("layer_norm_eps", 1e-12),
        activation=read.activation("hidden_act", default="gelu"),
    )


def _mpnet_names(config: EncoderConfig) -> Names:
    names = _bert_names(config)
    del names["token_type"]
    layer = "encoder.layer.{i}."
    names["bias"] = ("encoder.relative_attention_bias",)
    names["layers.{i}.attention.qkv"] = tuple(f"{layer}attention.attn.{x}" for x in "qkv")
    names["layers.{i}.attention.o"] = (layer + "attention.attn.o",)
    names["layers.{i}.attention_norm"] = (layer + "attention.LayerNorm",)
    return names


MPNET = EncoderFamily(("mpnet",), _mpnet, _mpnet_names)


# --- ModernBERT (Warner et al. 2024): windows, rotary, GeGLU, norms before the blocks ---------------------


def _modernbert(read: ConfigReader) -> EncoderConfig:
    common = _common(read)
    layers = common["num_layers"]
    every = read.integer("global_attn_every_n_layers", 3)
    kinds = read.get("layer_types")
    local = (
        [kind == "sliding_attention" for kind in kinds] if kinds else [i % every != 0 for i in range(layers)]
    )
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
    thetas = {
        "full_attention": read.number("global_rope_theta", 160000.0),
        "sliding_attention": read.number("local_rope_theta", 10000.0),
    }
    parameters = read.get("rope_parameters") or {}
    for kind in thetas:
        given = parameters.get(kind) or {}
        if given.get("rope_type", "default") != "default":
            raise read.refuse("rope_parameters", parameters, "rope_type default")
        thetas[kind] = float(given.get("rope_theta", thetas[kind]))
    return thetas["full_attention"], thetas["sliding_attention"]


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


# --- Nomic BERT (Nussbaum et al. 2024) and its mixture of experts -----------------------------------------

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
    parameters = read.get("rope_parameters") or {}
    theta = float(parameters.get("rope_theta") or read.get("rotary_emb_base") or 1000.0)
    if read.get("rotary_scaling_factor") or parameters.get("rope_type", "default") != "default":
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


# --- Jina v2 (Günther et al. 2023): ALiBi and gated units on BERT ------------------------------------------


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
        **_common(read),
        max_tokens=read.integer("max_position_embeddings", 8192),
        token_types=read.integer("type_vocab_size", 2, least=0),
        distance_bias="alibi",
        norm_eps=read.number("layer_norm_eps", 1e-12),
        gated=True,
        activation=activation,
        up_bias=False,
    )


def _jina_names(config: EncoderConfig) -> Names:
    names = _bert_names(config)
    del names["position"], names["layers.{i}.mlp.up"]
    layer = "encoder.layer.{i}."
    names["layers.{i}.mlp.gate_up"] = (layer + "mlp.gated_layers",)
    names["layers.{i}.mlp.down"] = (layer + "mlp.wo",)
    names["layers.{i}.mlp_norm"] = (layer + "mlp.layernorm",)
    return names


JINA = EncoderFamily(("jina_bert",), _jina, _jina_names)


# --- GTE and Snowflake's "new" architecture (Zhang et al. 2024): rotary and gated units on BERT -----------


def _gte(read: ConfigReader) -> EncoderConfig:
    read.only("position_embedding_type", ("rope",))
    read.only("layer_norm_type", ("layer_norm",))
    read.only("logn_attention_scale", (False,))
    for name in ("pack_qkv", "unpad_inputs", "use_memory_efficient_attention", "logn_attention_clip1"):
        read.get(name)
    read.get("tie_word_embeddings")
    common = _common(read)
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
    """Plain, or NTK with a fixed factor, which is a larger base: theta * factor ** (dim / (dim - 2))."""
    parameters = read.get("rope_parameters") or {}
    theta = float(parameters.get("rope_theta") or read.get("rope_theta") or 160000.0)
    scaling = read.get("rope_scaling") or {}
    kind = scaling.get("type") or scaling.get("rope_type") or parameters.get("rope_type") or "default"
    if kind != "default":
        raise read.refuse("rope_scaling", scaling or parameters, "null")
    return RopeConfig(dim=dim, theta=theta)


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


# --- EuroBERT (Boizard et al. 2025): a bidirectional Llama -------------------------------------------------


def _eurobert(read: ConfigReader) -> EncoderConfig:
    common = _common(read)
    for name in ("tie_word_embeddings", "clf_pooling", "classifier_pooling", "mask_token_id"):
        read.get(name)
    common["num_kv_heads"] = read.integer("num_key_value_heads", common["num_heads"])
    common["head_dim"] = read.integer("head_dim", common["head_dim"])
    parameters = read.get("rope_parameters") or read.get("rope_scaling") or {}
    if (parameters.get("rope_type") or parameters.get("type") or "default") != "default":
        raise read.refuse("rope_parameters", parameters, "rope_type default")
    theta = float(parameters.get("rope_theta") or read.get("rope_theta") or 10000.0)
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

ENCODER_FAMILIES = (BERT, ROBERTA, DISTILBERT, MPNET, MODERNBERT, NOMIC, JINA, GTE, EUROBERT)


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
