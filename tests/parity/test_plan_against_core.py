"""The plan's numbers against a core that was really built, on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.checkpoints.fetch import installed
from headrace.config.plan.shape import ENCODER_TYPES, read_shape
from headrace.config.plan.weights import KEPT_BLOCKS
from headrace.config.quantization import TYPES
from headrace.config.resolve import resolve
from headrace.config.schema.own import SCHEMES
from headrace.config.spec import EngineSpec
from headrace.engines.build import build
from headrace.engines.inspect import inspect
from headrace.engines.plan import cpu_machine, plan_for
from headrace.models.encoder_families import ENCODER_FAMILIES, encoder_family, read_encoder_config
from headrace.quantization.schemes.int4 import fast_on_this_cpu
from parity.encoders import FAMILIES, add_pooling, make
from support.tiny_folder import write_llama


def same(spec: EngineSpec, tolerance: float) -> None:
    plan = plan_for(spec, cpu_machine())
    core, ready = build(spec)
    summary: dict[str, Any] = ready.summary
    del core
    assert ready.engine == plan.engine
    assert summary["dtype"] == plan.dtype
    assert plan.step_tokens == summary["max_num_batched_tokens"]
    assert plan.max_model_len == ready.max_model_len
    weights = tolerance if plan.kv_token_bytes else 0.05  # files of encoders have poolers that nobody reads
    assert plan.weights.parameters == pytest.approx(summary["parameters"], rel=weights)
    assert plan.weights.total == pytest.approx(summary["weight_bytes"], rel=weights)
    if not plan.kv_token_bytes:
        return
    assert plan.pool_tokens == pytest.approx(summary["kv_tokens"], rel=tolerance)
    assert plan.pool_tokens * plan.kv_token_bytes == pytest.approx(
        summary["kv_bytes"], rel=tolerance, abs=2**20
    )
    assert plan.step_tokens == summary["max_num_batched_tokens"]
    assert plan.max_model_len == ready.max_model_len


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ({}, {}),
        ({"tie_word_embeddings": True}, {"dtype": "bfloat16"}),
        ({"num_hidden_layers": 5, "vocab_size": 999}, {"kv_cache_bytes": 3 * 2**20}),
        ({"num_key_value_heads": 3, "intermediate_size": 200}, {"max_num_seqs": 3, "max_model_len": 100}),
        ({"head_dim": 32}, {"block_size": 32, "max_num_batched_tokens": 64}),
    ],
)
def test_tiny_models(config: dict[str, Any], settings: dict[str, Any], tmp_path: Path) -> None:
    torch.set_num_threads(1)
    write_llama(tmp_path, **config)
    same(resolve(str(tmp_path), **settings).spec, 1e-9)


@pytest.mark.parametrize("scheme", ["int8", "int4", "int4-g64"])
def test_schemes_of_the_cpu(scheme: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    write_llama(tmp_path, hidden_size=128, intermediate_size=256, vocab_size=320, num_attention_heads=8)
    same(resolve(str(tmp_path), quantization=scheme).spec, 0.03)


def test_kept_blocks_are_those_of_the_loader() -> None:
    from headrace.quantization.ggml import KEEPABLE

    assert set(KEPT_BLOCKS) == set(KEEPABLE)
    assert cpu_machine().packs == fast_on_this_cpu()
    assert {scheme for scheme in SCHEMES if scheme.startswith("int")} == {
        t for t in TYPES if t.startswith("int")
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("limit", [None, 19])
def test_encoders(family: str, limit: int | None, tmp_path: Path) -> None:
    """Engine, dtype and context of every family, and what the plan knows of its shape."""
    torch.set_num_threads(1)
    make(tmp_path, family)
    add_pooling(tmp_path)
    if limit is not None:
        (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": limit}))
    same(EngineSpec(model=str(tmp_path), path=tmp_path), 0.0)
    config = json.loads((tmp_path / "config.json").read_text())
    declared = read_encoder_config(config, encoder_family(config))
    shape = read_shape(inspect(tmp_path), encoder=True)
    assert shape.bidirectional
    assert shape.gated == declared.gated
    assert (shape.layers, shape.hidden, shape.intermediate, shape.heads) == (
        declared.num_layers, declared.hidden_size, declared.intermediate_size, declared.num_heads
    )  # fmt: skip


def test_encoder_families_are_those_of_the_models() -> None:
    assert set(ENCODER_TYPES) == {name for family in ENCODER_FAMILIES for name in family.model_types}


@pytest.mark.models
@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("smollm2-135m", {}),
        ("smollm2-135m", {"dtype": "float32", "max_model_len": 2048}),
        ("minilm", {}),
        ("minilm", {"dtype": "bfloat16"}),
    ],
)
def test_packaged_models(model: str, settings: dict[str, Any]) -> None:
    if installed(model) is None:
        pytest.skip(f"{model} is not on this machine")
    torch.set_num_threads(1)
    pool = {} if model == "minilm" else {"kv_cache_bytes": 128 * 2**20}
    same(EngineSpec(model=model, **settings, **pool), 0.03)
