"""A Hugging Face folder with a tiny random model, written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TINY_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}

# Columns that groups of every quantized type divide.
GROUPED: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


def write_llama(folder: Path, **changes: Any) -> Path:
    """config.json and model.safetensors of a random Llama."""
    config = {**TINY_LLAMA, **changes}
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    kv, dim, vocab = config["num_key_value_heads"], config["head_dim"], config["vocab_size"]
    generator = torch.Generator().manual_seed(7)

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * 0.2

    tensors = {
        "model.embed_tokens.weight": weight(vocab, hidden),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": weight(vocab, hidden),
    }
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        tensors[at + "input_layernorm.weight"] = torch.ones(hidden)
        tensors[at + "post_attention_layernorm.weight"] = torch.ones(hidden)
        tensors[at + "self_attn.q_proj.weight"] = weight(heads * dim, hidden)
        tensors[at + "self_attn.k_proj.weight"] = weight(kv * dim, hidden)
        tensors[at + "self_attn.v_proj.weight"] = weight(kv * dim, hidden)
        tensors[at + "self_attn.o_proj.weight"] = weight(hidden, heads * dim)
        tensors[at + "mlp.gate_proj.weight"] = weight(inner, hidden)
        tensors[at + "mlp.up_proj.weight"] = weight(inner, hidden)
        tensors[at + "mlp.down_proj.weight"] = weight(hidden, inner)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_tokenizer(folder: Path, *, vocab_size: int = 300) -> Path:
    """A byte-level tokenizer of ids 3 to 258 with <pad> 0, <s> 1, </s> 2, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {piece: i for i, piece in enumerate(alphabet, 3)}
    assert len(vocab) <= vocab_size
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_moe(folder: Path, **changes: Any) -> Path:
    """The same of a Qwen 3 with experts, whose first layer is dense; each expert's matrices in tensors of their own."""
    moe = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [0]}
    names = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "norm_topk_prob": True}
    write_llama(folder, **{**names, **moe, **changes})
    config = json.loads((folder / "config.json").read_text())
    hidden, inner, experts = (config[k] for k in ("hidden_size", "moe_intermediate_size", "num_experts"))
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(8)
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        for part in "qk":
            tensors[f"{at}self_attn.{part}_norm.weight"] = torch.ones(config["head_dim"])
        if i in config["mlp_only_layers"]:
            continue
        for part in ("gate", "up", "down"):
            del tensors[f"{at}mlp.{part}_proj.weight"]
        tensors[f"{at}mlp.gate.weight"] = torch.randn(experts, hidden, generator=generator)
        for expert in range(experts):
            for part, shape in (
                ("gate", (inner, hidden)),
                ("up", (inner, hidden)),
                ("down", (hidden, inner)),
            ):
                name = f"{at}mlp.experts.{expert}.{part}_proj.weight"
                tensors[name] = torch.randn(shape, generator=generator) * 0.2
    save_file(tensors, folder / "model.safetensors")
    return folder
