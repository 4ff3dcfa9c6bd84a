"""What a family file holds, and the reading that all families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from headrace.layers.rope_config import RopeConfig
from headrace.models.arrangement import Stacked
from headrace.models.declaration import DecoderConfig, ExpertsConfig
from headrace.models.reading import ConfigReader
from headrace.models.rope import read_ropes

__all__ = [
    "FUSED_EXPERTS",
    "Family",
    "WeightNames",
    "expert_names",
    "experts",
    "layer_windows",
    "qwen_experts",
    "standard",
    "standard_names",
]

# Module of the decoder -> modules of the checkpoint whose weights lie in it one after another, without the
# checkpoint's prefix. ``{}`` is the layer; ``{expert}`` stands for all experts, the first one's modules first.
WeightNames = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Family:
    """One family of checkpoints.

    Attributes:
        architectures: values of ``architectures[0]`` that it reads; names ending in Model have no head.
        read: `config.json` -> declaration.
        names: where the weights lie.
        defaults: what the family assumes for fields that `config.json` leaves out.
        text_config: the decoder's fields lie in this sub-object, if the file has it (multimodal checkpoints).
        ignored: prefixes of tensors that do not belong to the decoder (towers for other media).
        fused: tensors that hold a module of ``names`` whole, [experts, out, in], in checkpoints that have them
            instead; its bias has the same name and ``_bias``.
        stacked: how these tensors lie in 16 bits, and the biases, where it is not so; keys are those of ``fused``.
        turn_ends: tokens that end a turn, whatever the checkpoint's files name as its end.
    """

    architectures: tuple[str, ...]
    read: Callable[[ConfigReader], DecoderConfig]
    names: WeightNames
    defaults: Mapping[str, Any] = field(default_factory=dict)
    text_config: str | None = None
    ignored: tuple[str, ...] = ()
    fused: Mapping[str, str] = field(default_factory=dict)
    stacked: Mapping[str, Stacked] = field(default_factory=dict)
    turn_ends: tuple[str, ...] = ()


def standard_names(**changes: tuple[str, ...]) -> WeightNames:
    """The names of Llama and of most after it; a change may replace any (an empty one removes it).

    ``changes`` are keyed by the decoder's names within a layer, with ``_`` for the dot.
    """
    attention, mlp = "layers.{}.self_attn.", "layers.{}.mlp."
    names = {
        "attention.qkv": tuple(attention + part for part in ("q_proj", "k_proj", "v_proj")),
        "attention.o": (attention + "o_proj",),
        "attention.qk_norm.q": (attention + "q_norm",),
        "attention.qk_norm.k": (attention + "k_norm",),
        "mlp.gate_up": (mlp + "gate_proj", mlp + "up_proj"),
        "mlp.down": (mlp + "down_proj",),
        "attention_norm": ("layers.{}.input_layernorm",),
        "mlp_norm": ("layers.{}.post_attention_layernorm",),
    }
    keys = {
        name.replace(".", "_"): name for name in (*names, "mlp.up", "post_attention_norm", "post_mlp_norm")
    }
    names |= {keys[key]: tuple(f"layers.{{}}.{source}" for source in value) for key, value in changes.items()}
    table = {f"layers.{{}}.{name}": sources for name, sources in names.items()}
    return {"embed": ("embed_tokens",), "norm": ("norm",), **table}


# As transformers holds them in memory, and some checkpoints on disk.
FUSED_EXPERTS = {
    "layers.{}.mlp.experts.gate_up": "layers.{}.mlp.experts.gate_up_proj",
    "layers.{}.mlp.experts.down": "layers.{}.mlp.experts.down_proj",
}


def expert_names(
    block: str = "mlp",
    *,
    router: str = "gate",
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> WeightNames:
    """Names of layers with experts, beside those of ``standard_names``.

    Args:
        block: of the mixture within a layer of the checkpoint.
        router: its name there.
        parts: gate, up and down of one expert.
    """
    mine, theirs = "layers.{}.mlp.", f"layers.{{}}.{block}."
    gate, up, down = (f"{theirs}experts.{{expert}}.{part}" for part in parts)
    return {
        mine + "router": (theirs + router,),
        mine + "experts.gate_up": (gate, up),
        mine + "experts.down": (down,),
        mine + "shared.gate_up": (theirs + "shared_expert.gate_proj", theirs + "shared_expert.up_proj"),
        mine + "shared.down": (theirs + "shared_expert.down_proj",),
        mine + "shared_gate": (theirs + "shared_expert_gate",),
    }


def qwen_experts(config: ConfigReader, **choices: Any) -> ExpertsConfig:
    """The fields of Qwen 2's and 3's mixtures; ``choices`` are fields of ExpertsConfig."""
    layers = config.integer("num_hidden_layers")
    every = config.integer("decoder_sparse_step", 1)
    plain = config.get("mlp_only_layers", [])
    if not isinstance(plain, list) or not all(isinstance(i, int) and 0 <= i < layers for i in plain):
        raise config.refuse("mlp_only_layers", plain, f"a list of layers below {layers}")
    dense = frozenset(i for i in range(layers) if i in plain or (i + 1) % every)
    return experts(
        config, "num_experts", config.integer("moe_intermediate_size"), dense_layers=dense, **choices
    )


def experts(config: ConfigReader, count: str, size: int, **choices: Any) -> ExpertsConfig:
    """What all mixtures state.

    Args:
        count: the field with the number of experts.
        size: intermediate size of one.
        choices: fields of ExpertsConfig; ``renormalize`` is ``norm_topk_prob`` by default.
    """
    other = "num_local_experts" if count == "num_experts" else "num_experts"  # both words are in use
    number = config.integer(count, config.get(other))
    config.only(other, [number])
    chosen = config.integer("num_experts_per_tok")
    if chosen > number:
        raise config.refuse("num_experts_per_tok", chosen, f"at most {count} ({number})")
    if "renormalize" not in choices:
        choices["renormalize"] = config.flag("norm_topk_prob")
    for training in ("router_aux_loss_coef", "output_router_logits", "router_jitter_noise"):
        config.get(training)
    return ExpertsConfig(
        num_experts=number,
        experts_per_token=chosen,
        intermediate_size=size,
        activation=config.activation("hidden_act", default="silu"),
        **choices,
    )


def layer_windows(config: ConfigReader, layers: int, window: int | None) -> tuple[int | None, ...] | None:
    """The window of each layer by ``layer_types``; None where the file does not say."""
    types = config.get("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != layers:
        raise config.refuse("layer_types", types, f"a list of {layers} layer types")
    for name in types:
        if name not in ("full_attention", "sliding_attention"):
            raise config.refuse("layer_types", name, "full_attention or sliding_attention")
        if name == "sliding_attention" and window is None:
            raise config.refuse("sliding_window", None, "a window, because layer_types names sliding layers")
    return tuple(window if name == "sliding_attention" else None for name in types)


def standard(
    config: ConfigReader,
    *,
    ropes: Callable[[int], tuple[RopeConfig, RopeConfig | None]] | None = None,
    windows: tuple[int | None, ...] | None = None,
    tied: bool = False,
    norm_eps: float = 1e-6,
    **choices: Any,
) -> DecoderConfig:
    """The fields that all families share, and the family's own choices.

    Args:
        ropes: head_dim -> rotary embeddings, where the plain reading does not do.
        windows: of each layer; None: full attention everywhere.
        tied: whether the head is the embedding table, when the file does not say.
        norm_eps: where the file does not say.
        choices: fields of DecoderConfig.
    """
    layers = config.integer("num_hidden_layers")
    hidden = config.integer("hidden_size")
    heads = config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise config.refuse("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads ({heads})")
    head_dim = config.integer("head_dim", hidden // heads)
    rope, local_rope = ropes(head_dim) if ropes else read_ropes(config, head_dim)
    activation = choices.pop("activation", None) or config.activation("hidden_act", default="silu")
    fields: dict[str, Any] = {
        "vocab_size": config.integer("vocab_size"),
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": config.integer("intermediate_size"),
        "max_position_embeddings": config.integer("max_position_embeddings", 2048),
        "rope": rope,
        "local_rope": local_rope,
        "windows": windows or (None,) * layers,
        "attention_scale": head_dim**-0.5,
        "norm_eps": config.number("rms_norm_eps", norm_eps),
        "activation": activation,
        "tied": config.flag("tie_word_embeddings", tied),
        "headless": config.architecture.endswith("Model"),
    }
    return DecoderConfig(**{**fields, **choices})
