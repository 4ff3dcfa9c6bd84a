"""Mixtures of experts on CPUs: routing, sums, and what is refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from headrace.config.plan.facts import Facts
from headrace.config.plan.shape import read_shape
from headrace.config.plan.weights import expected_tensors
from headrace.errors import UnsupportedCheckpoint
from headrace.kernels.experts import combine, expert_linear, gated, plan_experts, route
from headrace.models.decoder import DecoderModel
from headrace.models.loading import load_decoder, random_weights
from headrace.models.registry import read_config
from parity.decoders import DictSource

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 31,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [0],
}


@pytest.mark.parametrize("renormalize", [False, True])
def test_route(renormalize: bool) -> None:
    logits = torch.randn(9, 13, generator=torch.Generator().manual_seed(1)) * 3
    weights, chosen = route(logits, 4, renormalize=renormalize)
    values, indices = logits.softmax(-1).topk(4)
    if renormalize:
        values = values / values.sum(-1, keepdim=True)
    assert torch.equal(chosen, indices.to(torch.int32))
    torch.testing.assert_close(weights, values, rtol=1e-6, atol=1e-7)


def test_route_of_equal_and_wrong_logits() -> None:
    logits = torch.zeros(3, 5)
    logits[1, 2] = torch.nan
    logits[2, 4] = torch.inf
    weights, chosen = route(logits, 3, renormalize=True)
    assert chosen[0].tolist() == [0, 1, 2]
    assert chosen[1].tolist() == [0, 1, 3]
    assert weights[1].isnan().all() and not weights[2].isfinite().all()
    torch.testing.assert_close(weights[0], torch.full((3,), 1 / 3))


def test_clamped_swiglu() -> None:
    both = torch.randn(5, 14, generator=torch.Generator().manual_seed(2)) * 8
    gate, up = both[:, :7].clamp(max=7), both[:, 7:].clamp(-7, 7)
    torch.testing.assert_close(gated(both, "clamped_swiglu"), gate * torch.sigmoid(1.702 * gate) * (up + 1))


def test_products_of_pairs() -> None:
    generator = torch.Generator().manual_seed(3)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((6, 10), (5 * 8, 10), (5 * 8,)))
    chosen = torch.tensor([[4, 0], [4, 1], [1, 4], [0, 4], [4, 1], [1, 0]], dtype=torch.int32)
    plan = plan_experts(chosen, 5)
    parts = expert_linear(x, weight, plan, bias=bias, gate="silu")
    back = expert_linear(parts, weight[:, :4].contiguous(), plan)
    weights = torch.rand(6, 2, generator=generator)
    residual = torch.randn(6, 8, generator=generator)
    summed = combine(back, weights, residual)
    for t in range(6):
        expected = residual[t].clone()
        for j in range(2):
            e = int(chosen[t, j])
            both = weight.view(5, 8, 10)[e] @ x[t] + bias.view(5, 8)[e]
            inner = F.silu(both[:4]) * both[4:]
            torch.testing.assert_close(parts[2 * t + j], inner)
            expected += weights[t, j] * (weight.view(5, 8, 10)[e, :, :4] @ inner)
        torch.testing.assert_close(summed[t], expected)


def _tensors() -> dict[str, torch.Tensor]:
    model = random_weights(read_config(CONFIG), dtype=torch.float32, device="cpu", seed=1)
    tensors = {}
    layer = "model.layers.{}."
    for i, each in enumerate(model.layers):
        at = layer.format(i)
        q, k, v = each.attention.qkv.weight.split(each.attention.qkv.parts)
        tensors |= {f"{at}self_attn.{n}_proj.weight": w for n, w in zip("qkv", (q, k, v))}
        tensors[f"{at}self_attn.o_proj.weight"] = each.attention.o.weight
        tensors |= {f"{at}self_attn.{n}_norm.weight": torch.ones(16) for n in "qk"}
        tensors |= {f"{at}{n}_layernorm.weight": torch.ones(32) for n in ("input", "post_attention")}
        if i == 0:
            gate, up = each.mlp.gate_up.weight.chunk(2)
            tensors |= {f"{at}mlp.gate_proj.weight": gate, f"{at}mlp.up_proj.weight": up}
            tensors[f"{at}mlp.down_proj.weight"] = each.mlp.down.weight
            continue
        tensors[f"{at}mlp.gate.weight"] = each.mlp.router.weight
        both = each.mlp.experts.gate_up.weight.view(4, 2, 24, 32)
        down = each.mlp.experts.down.weight.view(4, 32, 24)
        for e in range(4):
            names = ("gate_proj", "up_proj", "down_proj")
            for name, value in zip(names, (both[e, 0], both[e, 1], down[e])):
                tensors[f"{at}mlp.experts.{e}.{name}.weight"] = value
    ends = {"model.embed_tokens": model.embed, "model.norm": model.norm, "lm_head": model.head}
    return tensors | {f"{name}.weight": module.weight for name, module in ends.items()}


def _load(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> DecoderModel:
    return load_decoder(config, DictSource(tensors), dtype=torch.float32, device="cpu")


def test_loads() -> None:
    tensors = _tensors()
    model = _load(CONFIG, tensors)
    assert model.layers[1].mlp.experts.gate_up.weight.shape == (4 * 48, 32)
    assert torch.equal(model.layers[1].mlp.router.weight, tensors["model.layers.1.mlp.gate.weight"])


def test_misfits_are_named() -> None:
    tensors = _tensors()
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    with pytest.raises(UnsupportedCheckpoint, match=name):
        _load(CONFIG, {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(UnsupportedCheckpoint, match=r"experts\.3\.up_proj.* \[24, 31\]"):
        _load(CONFIG, {**tensors, name: torch.zeros(24, 31)})
    with pytest.raises(UnsupportedCheckpoint, match=r"experts\.4"):
        _load(CONFIG, {**tensors, name.replace("3", "4"): torch.zeros(24, 32)})
    with pytest.raises(UnsupportedCheckpoint, match="num_experts_per_tok"):
        read_config({**CONFIG, "num_experts_per_tok": 5})
    with pytest.raises(UnsupportedCheckpoint, match="mlp_only_layers"):
        read_config({**CONFIG, "mlp_only_layers": [7]})
    with pytest.raises(UnsupportedCheckpoint, match="shared_expert_intermediate_size"):
        read_config({**CONFIG, "shared_expert_intermediate_size": 64})


PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960,
        "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
        "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-6,
        "rope_scaling": None, "rope_theta": 1e6, "router_aux_loss_coef": 0.001, "sliding_window": None,
        "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
    },
    "Qwen1.5-MoE-A2.7B": {
        "architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "decoder_sparse_step": 1,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632,
        "max_position_embeddings": 8192, "max_window_layers": 21, "model_type": "qwen2_moe",
        "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60,
        "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16,
        "output_router_logits": False, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 5632, "sliding_window": 32768, "tie_word_embeddings": False,
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "Mixtral-8x7B-Instruct-v0.1": {
        "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "output_router_logits": False, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "router_aux_loss_coef": 0.02,
        "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32000,
    },
    "OLMoE-1B-7B-0924": {
        "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "clip_qkv": None, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 1024, "max_position_embeddings": 4096, "model_type": "olmoe",
        "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
        "num_hidden_layers": 16, "num_key_value_heads": 16, "output_router_logits": False, "rope_scaling": None,
        "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False, "vocab_size": 50304,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "experts", "chosen", "size", "renormalize", "shared"),
    [
        ("Qwen3-30B-A3B", 128, 8, 768, True, 0),
        ("Qwen1.5-MoE-A2.7B", 60, 4, 1408, False, 5632),
        ("Mixtral-8x7B-Instruct-v0.1", 8, 2, 14336, True, 0),
        ("OLMoE-1B-7B-0924", 64, 8, 1024, False, 0),
    ],
)
def test_published_configurations(
    name: str, experts: int, chosen: int, size: int, renormalize: bool, shared: int
) -> None:
    """Every field is read or known to change nothing; the plan counts what the decoder declares."""
    found = read_config(PUBLISHED[name])
    mixture = found.experts
    assert mixture is not None and mixture.dense_layers == frozenset()
    assert (mixture.num_experts, mixture.experts_per_token, mixture.intermediate_size) == (
        experts,
        chosen,
        size,
    )
    assert (mixture.renormalize, mixture.shared_size, mixture.shared_gate) == (
        renormalize,
        shared,
        shared > 0,
    )
    assert found.windows == (None,) * found.num_layers
    model = DecoderModel(found, dtype=torch.bfloat16, device="meta")
    shape = read_shape(Facts(where="", config=PUBLISHED[name], container="config"))
    planned = sum(math.prod(tensor.shape) for tensor in expected_tensors(shape, 2).values())
    assert planned == pytest.approx(sum(p.numel() for p in model.parameters()), rel=1e-4)
