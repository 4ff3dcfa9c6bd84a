"""The sizes of a model, from config.json in its many spellings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from headrace.config.plan.facts import Facts
from headrace.errors import UnsupportedCheckpoint

__all__ = ["ENCODER_TYPES", "ModelShape", "read_shape"]

_NAMES: dict[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "intermediate": ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner", "hidden_dim"),
    "vocab": ("vocab_size",),
    "context": (
        "max_position_embeddings",
        "n_positions",
        "max_trained_positions",
        "max_seq_len",
        "seq_length",
    ),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "chosen": ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_k", "moe_top_k"),
    "expert_size": ("moe_intermediate_size", "expert_intermediate_size"),
}

# model_type of the encoder families, and whether their MLP is gated.
ENCODER_TYPES = {
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "mpnet", "nomic_bert"), False
    ),
    **dict.fromkeys(("modernbert", "jina_bert", "new", "gte", "eurobert"), True),
}


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes, in elements and tokens.

    Attributes:
        kv_layers: layers that keep keys and values (linear attention keeps a state of fixed size instead).
        windows: layers whose attention reaches back only ``window`` tokens.
        experts, chosen: routed experts a layer, and how many a token uses; 0: none.
        expert_size: intermediate size of one expert.
        dense_layers: layers without experts, in a model with them.
        latent: numbers a token and layer keeps with latent attention (DeepSeek); 0: keys and values.
        encoder: answers in one pass, keeps no cache.
        bidirectional: of a family of encoders; else a decoder, whatever it is used for.
        wide_norms: gains are kept in float32 (Gemma stores them less one).
        sandwich: attention and feed-forward have a norm before and one after.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context: int
    tied: bool = False
    kv_layers: int = 0
    windows: int = 0
    window: int = 0
    experts: int = 0
    chosen: int = 0
    expert_size: int = 0
    shared_expert_size: int = 0
    dense_layers: int = 0
    latent: int = 0
    q_rank: int = 0
    nope_dim: int = 0
    rope_dim: int = 0
    value_dim: int = 0
    gated: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    encoder: bool = False
    bidirectional: bool = False
    wide_norms: bool = False
    sandwich: bool = False
    rope: Mapping[str, Any] | None = None

    def kv_elements(self, tensor_parallel: int = 1) -> int:
        """Numbers that one token keeps on one rank, over all layers."""
        if self.latent:
            return self.kv_layers * self.latent
        return self.kv_layers * 2 * max(1, self.kv_heads // tensor_parallel) * self.head_dim

    @property
    def attention_width(self) -> int:
        """Columns of q, k and v together."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


def read_shape(facts: Facts, *, encoder: bool = False) -> ModelShape:
    """Sizes of a checkpoint.

    Raises:
        UnsupportedCheckpoint: a size that everything needs is missing or no positive integer.
    """
    config = facts.text_config
    where = f"{facts.where}: config.json"
    layers, hidden, heads = (_need(config, name, where) for name in ("layers", "hidden", "heads"))
    kv_heads = _get(config, ("num_key_value_heads", "num_kv_heads", "n_kv_heads"), heads) or heads
    head_dim = _get(config, ("head_dim",), 0) or hidden // heads
    experts = _get(config, _NAMES["experts"], 0)
    intermediate = _get(config, _NAMES["intermediate"], 4 * hidden)
    windows, window = _windows(config, layers)
    rope_dim = _get(config, ("qk_rope_head_dim",), 0)
    bidirectional = encoder and config.get("model_type") in ENCODER_TYPES
    return ModelShape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=intermediate,
        vocab=_need(config, "vocab", where),
        context=_context(facts, config, encoder),
        tied=bool(config.get("tie_word_embeddings", _tied_by_default(facts.architecture))),
        kv_layers=0 if encoder else _kv_layers(config, layers),
        windows=windows,
        window=window,
        experts=experts if experts > 1 else 0,
        chosen=_get(config, _NAMES["chosen"], 0),
        expert_size=_get(config, _NAMES["expert_size"], intermediate),
        shared_expert_size=_shared(config),
        dense_layers=_dense_layers(config, layers) if experts > 1 else 0,
        latent=_get(config, ("kv_lora_rank",), 0) + rope_dim if config.get("kv_lora_rank") else 0,
        q_rank=_get(config, ("q_lora_rank",), 0),
        nope_dim=_get(config, ("qk_nope_head_dim",), 0),
        rope_dim=rope_dim,
        value_dim=_get(config, ("v_head_dim",), 0),
        gated=_gated(config),
        qkv_bias=bidirectional or _qkv_bias(config, facts.architecture),
        qk_norm=facts.architecture.startswith(("Qwen3", "Gemma3")),
        encoder=encoder,
        bidirectional=bidirectional,
        wide_norms=facts.architecture.startswith("Gemma"),
        sandwich=facts.architecture.startswith(("Gemma2", "Gemma3")),
        rope=_rope(config),
    )


def _gated(config: Mapping[str, Any]) -> bool:
    kind = str(config.get("model_type", ""))
    if kind == "nomic_bert":  # n_embd: the authors' words, in which it may be plain
        return "n_embd" not in config or "glu" in str(config.get("activation_function") or "swiglu")
    if kind == "bert" and config.get("position_embedding_type") == "alibi":
        return True  # JinaBert calls itself bert
    default = kind != "starcoder2" and config.get("hidden_act", "silu") not in ("gelu_new", "relu", "relu2")
    return ENCODER_TYPES.get(kind, default)


def _context(facts: Facts, config: Mapping[str, Any], encoder: bool) -> int:
    """Tokens of one input. RoBERTa and MPNet number positions from behind the padding's id."""
    positions = _get(config, _NAMES["context"], 0)
    if not encoder:
        return positions
    if "roberta" in facts.architecture.lower() or "camembert" in facts.architecture.lower():
        padding = config.get("pad_token_id")
        positions -= (padding if isinstance(padding, int) else 1) + 1
    elif facts.architecture.startswith("MPNet"):
        positions -= 2
    return min(positions, facts.max_tokens) if facts.max_tokens else positions


def _tied_by_default(architecture: str) -> bool:
    """Families whose config.json leaves tie_word_embeddings out because it is always true."""
    tied = ("Gemma", "Phi3Small", "Cohere", "Starcoder2", "Ernie4_5", "MiniCPM", "SmolLM3")
    return architecture.startswith(tied)


def _qkv_bias(config: Mapping[str, Any], architecture: str) -> bool:
    """By whichever name the family states it, or because it always has them."""
    names = ("attention_bias", "use_qkv_bias", "qkv_bias", "use_bias")
    stated = next((config[name] for name in names if isinstance(config.get(name), bool)), None)
    if architecture.startswith("Qwen2") and "Moe" not in architecture:
        return True
    always = ("Qwen2", "Glm", "SeedOss", "GptOss", "Starcoder2")
    return architecture.startswith(always) if stated is None else stated


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _get(config: Mapping[str, Any], names: tuple[str, ...], default: int) -> int:
    return next((found for name in names if (found := _number(config.get(name))) is not None), default)


def _need(config: Mapping[str, Any], what: str, where: str) -> int:
    found = _get(config, _NAMES[what], 0)
    if not found:
        names = _NAMES[what]
        seen = {name: config[name] for name in names if name in config}
        raise UnsupportedCheckpoint(
            f"{where}: {names[0]} is {seen[names[0]]!r} and must be a positive integer"
            if names[0] in seen
            else f"{where} lacks {names[0]}",
            param=names[0],
        )
    return found


def _layer_types(config: Mapping[str, Any]) -> list[str]:
    types = config.get("layer_types")
    return [str(kind) for kind in types] if isinstance(types, list) else []


def _kv_layers(config: Mapping[str, Any], layers: int) -> int:
    types = _layer_types(config)
    return sum("attention" in kind and "linear" not in kind for kind in types) if types else layers


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int, int]:
    window = _number(config.get("sliding_window")) or 0
    if not window or config.get("use_sliding_window") is False:
        return 0, 0
    types = _layer_types(config)
    if types:
        return sum("sliding" in kind for kind in types), window
    pattern = _number(config.get("sliding_window_pattern"))
    return (layers - layers // pattern if pattern else layers), window


def _dense_layers(config: Mapping[str, Any], layers: int) -> int:
    first = _get(config, ("first_k_dense_replace",), 0)
    listed = config.get("mlp_only_layers")
    step = _get(config, ("decoder_sparse_step", "moe_layer_freq", "interleave_moe_layer_step"), 1)
    if isinstance(listed, list) and listed:
        return len(listed)
    return first if step == 1 else layers - layers // step


def _shared(config: Mapping[str, Any]) -> int:
    size = _get(config, ("shared_expert_intermediate_size",), 0)
    count = _get(config, ("n_shared_experts",), 0)
    return size or count * _get(config, _NAMES["expert_size"], 0)


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    for name in ("rope_scaling", "rope_parameters"):
        value = config.get(name)
        if isinstance(value, dict):
            return value
    return None
