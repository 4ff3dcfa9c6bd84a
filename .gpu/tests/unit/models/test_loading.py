"""Weights: each tensor read once, and every misfit named."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headrace.errors import UnsupportedCheckpoint
from headrace.layers.linear import Linear
from headrace.models.loading import load_decoder, random_weights
from headrace.models.registry import read_config

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 11,
    "hidden_size": 12,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}


class Source:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.loads: Counter[str] = Counter()

    def names(self) -> list[str]:
        return list(self.tensors)

    def load(self, name: str) -> Tensor:
        self.loads[name] += 1
        return self.tensors[name]


def tensors(prefix: str = "model.") -> dict[str, Tensor]:
    shapes = {f"{prefix}embed_tokens": (11, 12), f"{prefix}norm": (12,), "lm_head": (11, 12)}
    for i in range(2):
        layer = f"{prefix}layers.{i}."
        shapes |= {
            f"{layer}self_attn.q_proj": (12, 12),
            f"{layer}self_attn.k_proj": (4, 12),
            f"{layer}self_attn.v_proj": (4, 12),
            f"{layer}self_attn.o_proj": (12, 12),
            f"{layer}mlp.gate_proj": (10, 12),
            f"{layer}mlp.up_proj": (10, 12),
            f"{layer}mlp.down_proj": (12, 10),
            f"{layer}input_layernorm": (12,),
            f"{layer}post_attention_layernorm": (12,),
        }
    return {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}


def load(source: Source, config: dict[str, Any] = CONFIG, **options: Any) -> Any:
    return load_decoder(config, source, **{"dtype": torch.float32, "device": "cpu", **options})


def test_every_tensor_is_read_once_and_fused() -> None:
    source = Source(tensors())
    steps: list[tuple[int, int]] = []
    model = load(source, progress=lambda done, total: steps.append((done, total)))
    assert set(source.loads.values()) == {1}
    assert set(source.loads) == set(source.tensors)
    q, k, v = (source.tensors[f"model.layers.1.self_attn.{p}_proj.weight"] for p in "qkv")
    assert torch.equal(model.layers[1].attention.qkv.weight, torch.cat((q, k, v)))
    total = sum(t.numel() * 4 for t in source.tensors.values())
    assert steps[-1] == (total, total)
    assert steps == sorted(steps)


def test_casts_to_the_asked_type() -> None:
    model = load(Source(tensors()), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_missing_tensor_is_named() -> None:
    weights = tensors()
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(UnsupportedCheckpoint, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load(Source(weights))


def test_missing_embedding_is_named() -> None:
    with pytest.raises(UnsupportedCheckpoint, match=r"embed_tokens\.weight"):
        load(Source({"something.else": torch.zeros(1)}))


def test_unexpected_tensor_is_named_with_its_shape_before_any_work() -> None:
    source = Source({**tensors(), "model.layers.0.self_attn.q_norm.weight": torch.ones(4)})
    with pytest.raises(UnsupportedCheckpoint, match=r"q_norm\.weight.*\[4\]"):
        load(source)
    assert source.loads == Counter({"model.layers.0.self_attn.q_norm.weight": 1})


def test_third_layer_is_unexpected() -> None:
    with pytest.raises(UnsupportedCheckpoint, match=r"layers\.2"):
        load(Source({**tensors(), "model.layers.2.mlp.up_proj.weight": torch.ones(10, 12)}))


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.k_proj.weight", "model.norm.weight"])
def test_wrong_shape_is_named(name: str) -> None:
    weights = tensors()
    weights[name] = torch.zeros(5, *weights[name].shape[1:])
    with pytest.raises(UnsupportedCheckpoint, match=rf"{name}.*\[5.*expected"):
        load(Source(weights))


def test_a_tensor_that_would_broadcast_is_refused() -> None:
    weights = tensors()
    weights["model.norm.weight"] = torch.ones(1)
    with pytest.raises(UnsupportedCheckpoint, match=r"model\.norm\.weight"):
        load(Source(weights))


def test_rotary_tables_and_a_spare_tied_head_are_ignored() -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    load(Source({**tensors(), **extra}))
    model = load(Source(tensors()), {**CONFIG, "tie_word_embeddings": True})
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("prefix", ["", "model."])
def test_headless_checkpoints(prefix: str) -> None:
    weights = tensors(prefix)
    del weights["lm_head.weight"]
    model = load(Source(weights), {**CONFIG, "architectures": ["LlamaModel"]})
    assert model.head is None
    with pytest.raises(UnsupportedCheckpoint, match=r"lm_head\.weight"):
        load(Source(weights))


@pytest.mark.parametrize(
    ("body", "head"),
    [("language_model.model.", "language_model.lm_head"), ("model.language_model.", "lm_head")],
)
def test_multimodal_checkpoints_give_their_text_part(body: str, head: str) -> None:
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {**CONFIG, "head_dim": 4, "architectures": None, "sliding_window": 8},
        "vision_config": {"hidden_size": 3},
        "tie_word_embeddings": False,
    }
    weights = tensors(body)
    weights[f"{head}.weight"] = weights.pop("lm_head.weight")
    for i in range(2):
        layer = f"{body}layers.{i}."
        weights |= {f"{layer}self_attn.{p}_norm.weight": torch.zeros(4) for p in "qk"}
        weights |= {f"{layer}{p}_feedforward_layernorm.weight": torch.zeros(12) for p in ("pre", "post")}
    weights["vision_tower.vision_model.post_layernorm.weight"] = torch.zeros(3)
    model = load(Source(weights), config)
    assert torch.equal(model.head.weight, weights[f"{head}.weight"])
    assert torch.equal(model.layers[0].mlp_norm.weight, torch.ones(12))


def test_transform_replaces_linears_while_loading() -> None:
    source = Source(tensors())
    seen: list[tuple[str, int]] = []

    class Doubled(nn.Module):
        def __init__(self, linear: Linear) -> None:
            super().__init__()
            self.weight = linear.weight * 2

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T

    def transform(path: str, linear: Linear) -> nn.Module:
        seen.append((path, len(source.loads)))
        return Doubled(linear) if path.endswith("down") else linear

    model = load(source, transform=transform)
    assert torch.equal(
        model.layers[1].mlp.down.weight, source.tensors["model.layers.1.mlp.down_proj.weight"] * 2
    )
    assert [path for path, _ in seen][:2] == ["layers.0.attention.qkv", "layers.0.attention.o"]
    assert seen[0][1] < len(source.tensors), "called as soon as the layer was there"


def test_random_weights_are_reproducible_and_finite() -> None:
    from headrace.layers.packed import PackedBatch

    declared = read_config(CONFIG)
    first, second, third = (
        random_weights(declared, dtype=torch.float32, device="cpu", seed=seed) for seed in (1, 1, 2)
    )
    batch = [PackedBatch.for_encoding([[1, 2, 3], [4]], causal=True) for _ in range(3)]
    outputs = [model.logits(model(b)) for model, b in zip((first, second, third), batch)]
    assert outputs[0].shape == (4, 11)
    assert outputs[0].isfinite().all()
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
