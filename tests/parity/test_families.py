"""Every family's logits equal transformers', however the prompt is cut and cached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from headrace.checkpoints.folder import FolderCheckpoint
from headrace.engines.quantize import quantize_checkpoint
from headrace.errors import UnsupportedCheckpoint
from headrace.models.loading import load_decoder
from headrace.quantization.containers import open_quantized
from headrace.quantization.linear import JoinedLinear
from headrace.quantization.scaled import ScaledLinear
from parity.decoders import (
    DictSource,
    make_pair,
    max_difference,
    our_logits,
    random_prompts,
    reference_logits,
    stored,
)

TOLERANCE = 2e-4
VOCAB = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1000.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1000.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 2.5, 4.0],
    "partial_rotary_factor": 0.75,
}

MOE = {"moe_intermediate_size": 40, "num_experts": 6, "num_experts_per_tok": 2}
# Names of experts' tensors in files differ from those in memory; Mixtral's layers, too.
IN_FILES = ("mixtral", "granite-moe")

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "LlamaForCausalLM", {}),
    "llama-tied-odd-heads": (
        "Llama",
        "LlamaForCausalLM",
        {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 54, "tie_word_embeddings": True},
    ),
    "llama-biases-head-dim": (
        "Llama",
        "LlamaForCausalLM",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 10, "num_key_value_heads": 6},
    ),
    "llama-llama3": ("Llama", "LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("Llama", "LlamaForCausalLM", {"rope_parameters": YARN}),
    "llama-linear": (
        "Llama",
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    ),
    "llama-dynamic": (
        "Llama",
        "LlamaForCausalLM",
        {"rope_parameters": DYNAMIC, "max_position_embeddings": 16},
    ),
    "llama-headless": ("Llama", "LlamaModel", {}),
    "mistral-short-window": ("Mistral", "MistralForCausalLM", {"sliding_window": 5}),
    "mistral-long-window": ("Mistral", "MistralForCausalLM", {"sliding_window": 200}),
    "mistral-no-window": ("Mistral", "MistralForCausalLM", {"sliding_window": None, "head_dim": 12}),
    "mistral-headless": ("Mistral", "MistralModel", {"sliding_window": 9}),
    "qwen2": ("Qwen2", "Qwen2ForCausalLM", {"num_attention_heads": 3, "num_key_value_heads": 1}),
    "qwen2-window": (
        "Qwen2",
        "Qwen2ForCausalLM",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2-headless": ("Qwen2", "Qwen2Model", {}),
    "qwen3": ("Qwen3", "Qwen3ForCausalLM", {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3-bias-yarn": (
        "Qwen3",
        "Qwen3ForCausalLM",
        {"head_dim": 16, "attention_bias": True, "rope_parameters": YARN},
    ),
    "qwen3-headless": ("Qwen3", "Qwen3Model", {"head_dim": 8}),
    "gemma2": (
        "Gemma2",
        "Gemma2ForCausalLM",
        {
            "head_dim": 12,
            "sliding_window": 7,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gemma2-headless": ("Gemma2", "Gemma2Model", {"head_dim": 8, "sliding_window": 100}),
    "gemma3": (
        "Gemma3Text",
        "Gemma3ForCausalLM",
        {
            "head_dim": 12,
            "sliding_window": 5,
            "query_pre_attn_scalar": 20,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gemma3-bidirectional": (
        "Gemma3Text",
        "Gemma3TextModel",
        {"head_dim": 8, "sliding_window": 8, "use_bidirectional_attention": True},
    ),
    "phi3": ("Phi3", "Phi3ForCausalLM", {"sliding_window": 9}),
    "phi3-longrope": (
        "Phi3",
        "Phi3ForCausalLM",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 20, "tie_word_embeddings": True},
    ),
    "granite": (
        "Granite",
        "GraniteForCausalLM",
        {
            "embedding_multiplier": 6.0,
            "logits_scaling": 4.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.3,
            "attention_bias": True,
        },
    ),
    "granite-moe": (
        "GraniteMoe",
        "GraniteMoeForCausalLM",
        {
            "num_local_experts": 5,
            "embedding_multiplier": 6.0,
            "logits_scaling": 4.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.3,
        },
    ),
    "olmo2": ("Olmo2", "Olmo2ForCausalLM", {"rms_norm_eps": 1e-5}),
    "qwen3-moe": ("Qwen3Moe", "Qwen3MoeForCausalLM", {**MOE, "head_dim": 12}),
    "qwen3-moe-renormalized-dense-layer": (
        "Qwen3Moe",
        "Qwen3MoeForCausalLM",
        {**MOE, "norm_topk_prob": True, "mlp_only_layers": [1], "attention_bias": True},
    ),
    "qwen3-moe-every-second-window": (
        "Qwen3Moe",
        "Qwen3MoeForCausalLM",
        {
            **MOE,
            "num_experts_per_tok": 6,
            "decoder_sparse_step": 2,
            "use_sliding_window": True,
            "sliding_window": 5,
        },
    ),
    "qwen2-moe": ("Qwen2Moe", "Qwen2MoeForCausalLM", {**MOE, "shared_expert_intermediate_size": 24}),
    "qwen2-moe-no-bias": (
        "Qwen2Moe",
        "Qwen2MoeForCausalLM",
        {**MOE, "shared_expert_intermediate_size": 60, "norm_topk_prob": True, "qkv_bias": False},
    ),
    "mixtral": ("Mixtral", "MixtralForCausalLM", {"num_local_experts": 5}),
    "mixtral-window": (
        "Mixtral",
        "MixtralForCausalLM",
        {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 7},
    ),
    "olmoe": (
        "Olmoe",
        "OlmoeForCausalLM",
        {"num_experts": 7, "num_experts_per_tok": 3, "norm_topk_prob": True},
    ),
    "gemma": ("Gemma", "GemmaForCausalLM", {"head_dim": 12, "hidden_act": "gelu"}),
    "olmo3": ("Olmo3", "Olmo3ForCausalLM", {"num_hidden_layers": 5, "sliding_window": 6}),
    "olmo3-yarn": (
        "Olmo3",
        "Olmo3ForCausalLM",
        {
            "sliding_window": 9,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
            },
        },
    ),
    "ministral": (
        "Ministral",
        "MinistralForCausalLM",
        {
            "head_dim": 8,
            "sliding_window": 6,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "starcoder2": ("Starcoder2", "Starcoder2ForCausalLM", {"sliding_window": 11}),
    "starcoder2-no-bias": (
        "Starcoder2",
        "Starcoder2ForCausalLM",
        {"use_bias": False, "tie_word_embeddings": False, "hidden_act": "gelu"},
    ),
    "stablelm": ("StableLm", "StableLmForCausalLM", {"use_qkv_bias": True}),
    "stablelm-half": ("StableLm", "StableLmForCausalLM", {"partial_rotary_factor": 0.5}),
    "exaone4": (
        "Exaone4",
        "Exaone4ForCausalLM",
        {"sliding_window": None, "layer_types": ["full_attention"] * 3, "rope_parameters": LLAMA3},
    ),
    "exaone4-window": (
        "Exaone4",
        "Exaone4ForCausalLM",
        {"num_hidden_layers": 5, "sliding_window": 6, "sliding_window_pattern": 2},
    ),
    "seed-oss": ("SeedOss", "SeedOssForCausalLM", {"head_dim": 10}),
    "seed-oss-biases": (
        "SeedOss",
        "SeedOssForCausalLM",
        {"head_dim": 8, "attention_out_bias": True, "mlp_bias": True},
    ),
    "cohere": ("Cohere", "CohereForCausalLM", {"logit_scale": 0.3}),
    "cohere-bias-untied": (
        "Cohere",
        "CohereForCausalLM",
        {"attention_bias": True, "tie_word_embeddings": False, "rope_parameters": LLAMA3},
    ),
    "cohere2": (
        "Cohere2",
        "Cohere2ForCausalLM",
        {"num_hidden_layers": 5, "sliding_window": 6, "sliding_window_pattern": 2},
    ),
    "glm": ("Glm", "GlmForCausalLM", {"head_dim": 12}),
    "glm4": ("Glm4", "Glm4ForCausalLM", {"head_dim": 16, "attention_bias": False}),
    "ernie4.5": ("Ernie4_5", "Ernie4_5ForCausalLM", {"head_dim": 12, "use_bias": True}),
    "nemotron": ("Nemotron", "NemotronForCausalLM", {"mlp_bias": True, "head_dim": 12}),
    "arcee": ("Arcee", "ArceeForCausalLM", {"attention_bias": True, "rope_parameters": YARN}),
    "gpt-oss": (
        "GptOss",
        "GptOssForCausalLM",
        {
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "head_dim": 12,
            "sliding_window": 7,
            "rope_parameters": {**YARN, "truncate": False, "beta_fast": 32.0, "beta_slow": 1.0},
        },
    ),
    "gpt-oss-no-bias-full-attention": (
        "GptOss",
        "GptOssForCausalLM",
        {
            "num_local_experts": 3,
            "num_experts_per_tok": 3,
            "attention_bias": False,
            "head_dim": 8,
            "layer_types": ["full_attention"] * 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
        },
    ),
    "smollm3": (
        "SmolLM3",
        "SmolLM3ForCausalLM",
        {"num_hidden_layers": 5, "no_rope_layer_interval": 2, "tie_word_embeddings": True},
    ),
    "smollm3-window": (
        "SmolLM3",
        "SmolLM3ForCausalLM",
        {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 6},
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_logits_equal_transformers(name: str) -> None:
    config_name, class_name, fields = CASES[name]
    config = getattr(hf, f"{config_name}Config")(**{**SIZES, **fields})
    pair = make_pair(config, getattr(hf, class_name), seed=len(name), from_files=name.startswith(IN_FILES))
    prompts = random_prompts(VOCAB, [33, 1, 12, 26, 12], seed=len(name))
    expected = reference_logits(pair, prompts)
    spread = float(torch.cat(expected).std())
    assert spread > 0.05, "logits too flat to tell anything"
    chunks = [None] if not pair.model.config.causal else [None, 64, 7, 1]
    for chunk in chunks:
        difference = max_difference(our_logits(pair.model, prompts, chunk), expected)
        assert difference <= TOLERANCE, f"chunk {chunk}: {difference}"


def test_experts_by_one_and_in_one() -> None:
    """Checkpoints hold an expert's matrices alone, or those of all in one tensor."""
    config = hf.Qwen3MoeConfig(**{**SIZES, **MOE})
    together = make_pair(config, hf.Qwen3MoeForCausalLM, seed=4)
    apart = make_pair(config, hf.Qwen3MoeForCausalLM, seed=4, from_files=True)
    assert "model.layers.0.mlp.experts.5.up_proj.weight" in stored(apart.reference)
    for (path, mine), other in zip(together.model.named_parameters(), apart.model.parameters(), strict=True):
        assert torch.equal(mine, other), path


def test_internlm3_is_llama_in_other_words() -> None:
    settings = {**SIZES, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-5}
    pair = make_pair(hf.LlamaConfig(**settings, rope_parameters=DYNAMIC), hf.LlamaForCausalLM)
    config = pair.reference.config.to_dict()
    for name in ("attention_bias", "mlp_bias", "rms_norm_eps"):
        del config[name]
    config |= {"architectures": ["InternLM3ForCausalLM"], "qkv_bias": True, "bias": True}
    tensors = DictSource(dict(pair.reference.state_dict()))
    model = load_decoder(config, tensors, dtype=torch.float32, device="cpu")
    assert model.config == pair.model.config
    with pytest.raises(UnsupportedCheckpoint, match="bias"):
        load_decoder({**config, "bias": False}, tensors, dtype=torch.float32, device="cpu")


def test_minicpm_is_granite_in_other_words() -> None:
    words = {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 1.4 / 3**0.5,
        "logits_scaling": 48 / 16,
        "attention_multiplier": 8**-0.5,
    }
    settings = {**SIZES, "tie_word_embeddings": True}
    pair = make_pair(hf.GraniteConfig(**settings, **words, rope_parameters=LLAMA3), hf.GraniteForCausalLM)
    config = {name: value for name, value in pair.reference.config.to_dict().items() if name not in words}
    config |= {
        "architectures": ["MiniCPMForCausalLM"],
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 16,
    }
    del config["tie_word_embeddings"]
    tensors = dict(pair.reference.state_dict())
    del tensors["lm_head.weight"]
    model = load_decoder(config, DictSource(tensors), dtype=torch.float32, device="cpu")
    assert model.config == pair.model.config


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8", "nvfp4", "fp8_block"])
def test_packed_rows_of_neighbouring_pairs(kind: str, tmp_path: Path) -> None:
    """Rows of queries and keys are put in another order, packed as well as dequantized."""
    sizes = {**SIZES, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 64, "head_dim": 16}
    pair = make_pair(hf.GlmConfig(**sizes), hf.GlmForCausalLM)
    pair.reference.save_pretrained(tmp_path / "plain")
    quantize_checkpoint(FolderCheckpoint(tmp_path / "plain"), kind, tmp_path / "packed")
    checkpoint = open_quantized(FolderCheckpoint(tmp_path / "packed"))
    dense, kept = (
        load_decoder(
            checkpoint.config, checkpoint, dtype=torch.float32, device="cpu", keep_packed=keep_packed
        )
        for keep_packed in (False, True)
    )
    linear = kept.layers[1].attention.qkv
    assert isinstance(linear, (ScaledLinear, JoinedLinear))
    assert torch.equal(linear.dequantize(), dense.layers[1].attention.qkv.weight)
    prompts = random_prompts(VOCAB, [20, 3])
    expected = torch.cat(reference_logits(pair, prompts))
    found = torch.cat(our_logits(dense, prompts, 7))
    assert float((found - expected).norm() / expected.norm()) < (0.2 if "8" in kind else 0.6)
