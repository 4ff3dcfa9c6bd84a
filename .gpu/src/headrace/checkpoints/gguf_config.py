"""GGUF metadata translated into the configuration that Hugging Face would write for the same model.

Keys follow llama.cpp's converter (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and the
converter's classes); facts that llama.cpp fixes in code instead of writing them into the file are fixed here
too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from headrace.checkpoints.gguf_header import GGUFHeader
from headrace.errors import UnknownArchitecture, UnsupportedCheckpoint, nearest

__all__ = ["Factors", "generation_config", "hf_config"]

Config = dict[str, Any]
Factors = Callable[[str], list[float]]
"""Reads a small float32 tensor of the file, by its GGUF name."""

_CONTROL = 3
# Texts that end a turn or a document in the families served; llama.cpp keeps the same kind of list.
_ENDS = frozenset(
    (
        "<|im_end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<end_of_turn>",
        "<|end|>",
        "</s>",
    )
)


class _Keys:
    """Typed access to ``<architecture>.<key>``."""

    def __init__(self, header: GGUFHeader) -> None:
        self.header = header
        self.prefix = header.architecture

    def has(self, tensor: str) -> bool:
        return tensor in self.header.tensors

    def get(self, key: str, default: Any = None) -> Any:
        value = self.header.metadata.get(f"{self.prefix}.{key}", default)
        if isinstance(value, list):  # one value a layer
            if not value or any(one != value[0] for one in value):
                raise UnsupportedCheckpoint(
                    f"{self.header.path}: {self.prefix}.{key} differs between layers, which is not supported"
                )
            return value[0]
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise self.wrong(key, value, "a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise self.wrong(key, value, "a number")
        return float(value)

    def wrong(self, key: str, value: object, wanted: str) -> UnsupportedCheckpoint:
        return UnsupportedCheckpoint(
            f"{self.header.path}: metadata key {self.prefix}.{key} is {value!r}; {wanted} is needed. "
            "Convert the model again with a current llama.cpp"
        )


def hf_config(header: GGUFHeader, factors: Factors) -> Config:
    """``config.json`` for this file.

    Args:
        factors: reads the rope factors that some files carry as tensors.

    Raises UnknownArchitecture for an architecture that is not translated, UnsupportedCheckpoint when a key
    that it needs is missing or wrong.
    """
    family = _FAMILIES.get(header.architecture)
    if family is None:
        raise UnknownArchitecture(
            f"{header.path} holds the GGUF architecture {header.architecture!r}; served from GGUF are "
            f"{', '.join(sorted(_FAMILIES))}{nearest(header.architecture, _FAMILIES)}"
        )
    keys = _Keys(header)
    return _shared(keys, header) | family(keys, factors)


def generation_config(header: GGUFHeader) -> Config:
    """``generation_config.json``: start, padding and all end tokens.

    End tokens are those the file names and those control tokens whose text is a known end of turn or
    document: GGUF has room for one end token where Hugging Face lists several.
    """
    metadata = header.metadata
    tokens: list[str] = metadata.get("tokenizer.ggml.tokens", [])
    types: list[int] = metadata.get("tokenizer.ggml.token_type", [])
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    ends += [i for i, (text, kind) in enumerate(zip(tokens, types)) if kind == _CONTROL and text in _ENDS]
    known = list(dict.fromkeys(i for i in ends if isinstance(i, int) and 0 <= i < len(tokens)))
    result: Config = {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "eos_token_id": known or None,
    }
    return {key: value for key, value in result.items() if value is not None}


def _shared(keys: _Keys, header: GGUFHeader) -> Config:
    """What all decoder families have."""
    heads = keys.integer("attention.head_count")
    hidden = keys.integer("embedding_length")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UnsupportedCheckpoint(f"{header.path} has no tensor token_embd.weight; it is no language model")
    ids = header.metadata
    eos = generation_config(header).get("eos_token_id")
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": keys.integer("attention.key_length", hidden // heads),
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(keys),
        "hidden_act": "silu",
        "attention_bias": keys.has("blk.0.attn_q.bias"),
        "tie_word_embeddings": not keys.has("output.weight"),
        "bos_token_id": ids.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos[0] if eos and len(eos) == 1 else eos,
        "pad_token_id": ids.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
    }


def _rope_scaling(keys: _Keys) -> Config | None:
    """Linear and YaRN scaling; others are a family's own matter."""
    kind = keys.get("rope.scaling.type", "none")
    factor = keys.get("rope.scaling.factor") or keys.get("rope.scale_linear") or 1.0
    if kind == "longrope":
        return None  # in the tensors of the file; see _phi3
    if kind in ("none", "linear"):
        return {"rope_type": "linear", "factor": float(factor)} if factor != 1.0 else None
    if kind != "yarn":
        raise keys.wrong("rope.scaling.type", kind, "none, linear, yarn or longrope")
    scaling: Config = {"rope_type": "yarn", "factor": float(factor)}
    if original := keys.get("rope.scaling.original_context_length"):
        scaling["original_max_position_embeddings"] = int(original)
    return scaling


def _llama(keys: _Keys, factors: Factors) -> Config:
    if keys.get("expert_count"):
        raise UnsupportedCheckpoint(
            f"{keys.header.path} is a mixture of experts (Mixtral) in GGUF form, which is not supported"
        )
    config: Config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "mlp_bias": keys.has("blk.0.ffn_up.bias"),
    }
    if keys.has("rope_freqs.weight"):
        config["rope_scaling"] = _llama3_scaling(keys, factors("rope_freqs.weight"))
    return config


def _llama3_scaling(keys: _Keys, found: list[float]) -> Config:
    """Llama 3.1's scaling, recovered from the per-frequency factors that the file holds in its place.

    The converter writes 1 for high frequencies, ``factor`` for low ones and a blend between. All published
    models share the other three parameters, so they are tried and the result is compared.
    """
    scaling: Config = {
        "rope_type": "llama3",
        "factor": max(found),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = _llama3_factors(keys.number("rope.freq_base", 10000.0), 2 * len(found), scaling)
    if not all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(expected, found)):
        raise UnsupportedCheckpoint(
            f"{keys.header.path}: tensor rope_freqs.weight does not follow Llama 3's rope scaling with "
            f"factor {scaling['factor']:g}; use the safetensors form of this model"
        )
    return scaling


def _llama3_factors(theta: float, dim: int, scaling: Config) -> list[float]:
    """Wavelength stretch of every frequency (as in Meta's Llama 3.1 reference code)."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    result = []
    for index in range(dim // 2):
        turns = context * theta ** (-2 * index / dim) / (2 * math.pi)  # in the original context
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        result.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return result


def _qwen2(keys: _Keys, factors: Factors) -> Config:
    del factors
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}


def _qwen3(keys: _Keys, factors: Factors) -> Config:
    del factors
    return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "use_sliding_window": False}


def _gemma_shared(keys: _Keys, largest: int) -> Config:
    """llama.cpp takes the attention scale of the 27B models from the width, of all others from head_dim."""
    head_dim = keys.integer("attention.key_length", 256)
    if keys.integer("block_count") == largest:
        scalar = keys.integer("embedding_length") // keys.integer("attention.head_count")
    else:
        scalar = head_dim
    return {
        "head_dim": head_dim,
        "query_pre_attn_scalar": scalar,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": keys.get("attn_logit_softcapping"),
        "final_logit_softcapping": keys.get("final_logit_softcapping"),
        "tie_word_embeddings": True,
    }


def _gemma2(keys: _Keys, factors: Factors) -> Config:
    del factors
    return _gemma_shared(keys, largest=46) | {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "sliding_window": keys.integer("attention.sliding_window", 4096),
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
    }


def _gemma3(keys: _Keys, factors: Factors) -> Config:
    del factors
    return _gemma_shared(keys, largest=62) | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "rope_theta": keys.number("rope.freq_base", 1000000.0),
        "rope_local_base_freq": keys.number("rope.freq_base_swa", 10000.0),
        "sliding_window": keys.integer("attention.sliding_window"),
        "sliding_window_pattern": keys.integer("attention.sliding_window_pattern", 6),
    }


def _phi3(keys: _Keys, factors: Factors) -> Config:
    head_dim = keys.integer("embedding_length") // keys.integer("attention.head_count")
    rotary = keys.integer("rope.dimension_count", head_dim)
    context = keys.integer("context_length")
    config: Config = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "head_dim": head_dim,
        "partial_rotary_factor": rotary / head_dim,
        "sliding_window": keys.get("attention.sliding_window") or None,
        "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length", context),
    }
    if keys.has("rope_factors_long.weight") and keys.has("rope_factors_short.weight"):
        config["rope_scaling"] = {
            "type": "longrope",
            "rope_type": "longrope",
            "long_factor": factors("rope_factors_long.weight"),
            "short_factor": factors("rope_factors_short.weight"),
        }
    return config


def _granite(keys: _Keys, factors: Factors) -> Config:
    del factors
    return {
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "attention_multiplier": keys.number("attention.scale"),
        "embedding_multiplier": keys.number("embedding_scale"),
        "residual_multiplier": keys.number("residual_scale"),
        "logits_scaling": keys.number("logit_scale"),
        "mlp_bias": keys.has("blk.0.ffn_up.bias"),
    }


def _olmo2(keys: _Keys, factors: Factors) -> Config:
    del factors
    if keys.get("attention.sliding_window"):
        raise UnknownArchitecture(f"{keys.header.path} is OLMo 3, which is not served; OLMo 2 is")
    return {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}


def _smollm3(keys: _Keys, factors: Factors) -> Config:
    """Every fourth layer has no rotary embedding: fixed in llama.cpp's code, absent from the file."""
    del factors
    layers = keys.integer("block_count")
    return {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "mlp_bias": keys.has("blk.0.ffn_up.bias"),
        "no_rope_layer_interval": 4,
        "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(layers)],
        "use_sliding_window": False,
    }


_FAMILIES: dict[str, Callable[[_Keys, Factors], Config]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "granite": _granite,
    "olmo2": _olmo2,
    "smollm3": _smollm3,
}
