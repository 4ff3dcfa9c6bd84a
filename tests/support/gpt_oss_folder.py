"""A folder with a tiny random gpt-oss: experts in 32 bits, or in MXFP4 as the released checkpoints pack them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

TINY_GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "experts_per_token": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initial_context_length": 32,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "max_position_embeddings": 512,
    "num_attention_heads": 6,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_local_experts": 5,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 16.0,
        "original_max_position_embeddings": 32,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 7,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 300,
}
MXFP4 = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}


def write_gpt_oss(
    folder: Path, *, packed: bool, seed: int = 0, large: float = 1.0, **changes: Any
) -> dict[str, Tensor]:
    """Write config.json and model.safetensors; returns what the latter holds.

    Args:
        large: factor of the experts' first projection, so that its gates meet their limits.
    """
    config = {**TINY_GPT_OSS, **changes}
    generator = torch.Generator().manual_seed(seed)
    tensors = _dense(config, generator)
    written = dict(tensors)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}.mlp.experts."
        experts, hidden, inner = (
            config[key] for key in ("num_local_experts", "hidden_size", "intermediate_size")
        )
        for name, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            tensors[f"{at}{name}_bias"] = torch.randn(experts, rows, generator=generator) * 0.3
            written[f"{at}{name}_bias"] = tensors[f"{at}{name}_bias"]
            factor = large if name == "gate_up_proj" else 1.0
            if packed:
                shape = (experts, rows, columns // 32, 16)
                written[f"{at}{name}_blocks"] = torch.randint(0, 256, shape, generator=generator).byte()
                exponents = torch.randint(121, 126, shape[:-1], generator=generator)
                written[f"{at}{name}_scales"] = (exponents + round(factor) - 1).byte()
            else:
                weight = torch.randn(experts, columns, rows, generator=generator) * 0.2 * factor
                written[f"{at}{name}"] = tensors[f"{at}{name}"] = weight
    if packed:
        config["quantization_config"] = MXFP4
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(written, folder / "model.safetensors")
    return written


def _dense(config: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    """What is never packed."""

    def random(*shape: int, scale: float = 0.2) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    hidden, vocab, heads = config["hidden_size"], config["vocab_size"], config["num_attention_heads"]
    q, kv = heads * config["head_dim"], config["num_key_value_heads"] * config["head_dim"]
    tensors = {
        "model.embed_tokens.weight": random(vocab, hidden),
        "model.norm.weight": 1 + random(hidden),
        "lm_head.weight": random(vocab, hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{norm}.weight"] = 1 + random(hidden)
        for name, rows, columns in (
            ("self_attn.q_proj", q, hidden),
            ("self_attn.k_proj", kv, hidden),
            ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, q),
            ("mlp.router", config["num_local_experts"], hidden),
        ):
            tensors[f"{at}{name}.weight"] = random(rows, columns)
            tensors[f"{at}{name}.bias"] = random(rows)
        tensors[f"{at}self_attn.sinks"] = random(heads, scale=2.0)
    return tensors
