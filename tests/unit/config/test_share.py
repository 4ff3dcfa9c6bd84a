"""Several models on one device: what they take together is never more than there is."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from headrace.config.plan.facts import Facts
from headrace.config.plan.plan import Plan, draw_plan
from headrace.config.plan.share import share_device
from headrace.config.spec import EngineSpec
from headrace.engines.plan import gpu_machine, plan_together
from headrace.errors import DoesNotFit
from unit.config.shapes import BGE_LARGE, QWEN3_06B, QWEN3_8B, write_config


def pair(
    config: dict[str, Any], name: str = "m", gpu: str = "H100", **settings: Any
) -> tuple[EngineSpec, Plan]:
    engine = "bert" if "Bert" in config["architectures"][0] else "dense"
    spec = EngineSpec(model=name, **settings)
    facts = Facts(where="x", config=config, container="config")
    return spec, draw_plan(spec, facts, gpu_machine(gpu), engine=engine, reason="")


def taken(spec: EngineSpec, plan: Plan) -> int:
    budget = plan.budget
    return budget.process + budget.weights + budget.reserve + (spec.kv_cache_bytes or 0)


def test_equal_models_get_equal_pools_and_one_alone_is_left_as_it_is() -> None:
    alone = pair(QWEN3_8B)
    assert share_device([alone]) == [alone[0]]
    pairs = [pair(QWEN3_8B, "a"), pair(QWEN3_8B, "b")]
    shared = share_device(pairs)
    assert abs((shared[0].kv_cache_bytes or 0) - (shared[1].kv_cache_bytes or 0)) <= 1
    usable = pairs[0][1].budget.usable
    total = sum(taken(spec, plan) for spec, (_, plan) in zip(shared, pairs))
    assert usable - 4096 < total <= usable
    for spec in shared:
        _, plan = pair(QWEN3_8B, spec.model, kv_cache_bytes=spec.kv_cache_bytes)
        assert plan.fits
        assert 0 < plan.budget.pool <= (spec.kv_cache_bytes or 0)


def test_a_small_pool_leaves_the_rest_to_the_others_and_an_encoder_has_none() -> None:
    pairs = [
        pair(QWEN3_8B, "large"),
        pair(QWEN3_06B, "small", max_num_seqs=2, max_model_len=1024),
        pair(BGE_LARGE, "encoder"),
    ]
    large, small, encoder = share_device(pairs)
    assert encoder.kv_cache_bytes is None
    assert small.kv_cache_bytes == pairs[1][1].budget.pool  # all that it can ever use
    assert (large.kv_cache_bytes or 0) > 20 * (small.kv_cache_bytes or 0)


def test_what_was_asked_for_is_kept() -> None:
    pairs = [
        pair(QWEN3_8B, "fixed", kv_cache_bytes=3 << 30),
        pair(QWEN3_8B, "long", max_model_len=40960),
        pair(QWEN3_06B, "any"),
    ]
    fixed, long, _ = share_device(pairs)
    assert (3 << 30) - (16 << 20) < (fixed.kv_cache_bytes or 0) <= 3 << 30
    _, plan = pair(QWEN3_8B, "long", max_model_len=40960, kv_cache_bytes=long.kv_cache_bytes)
    assert plan.fits
    assert plan.max_model_len == 40960


def test_too_many_are_refused_by_name() -> None:
    pairs = [pair(QWEN3_8B, f"m{i}") for i in range(5)]
    with pytest.raises(DoesNotFit, match=r"do not fit H100 together \(m0: .*m4: .*missing"):
        share_device(pairs)
    assert share_device([*pairs[:2], *(pair(QWEN3_8B, f"n{i}", gpu="H200") for i in range(2))])


def test_random_crowds_never_take_more_than_there_is() -> None:
    draw = random.Random(5)
    refused = 0
    for _ in range(20):
        crowd = [
            pair(
                draw.choice([QWEN3_8B, QWEN3_06B, BGE_LARGE]),
                f"m{i}",
                max_num_seqs=draw.choice([1, 16, 256]),
                **({"max_model_len": draw.choice([128, 512])} if draw.random() < 0.4 else {}),
            )
            for i in range(draw.randint(2, 5))
        ]
        try:
            shared = share_device(crowd)
        except DoesNotFit:
            refused += 1
            continue
        sizes = [taken(spec, plan) for spec, (_, plan) in zip(shared, crowd)]
        assert sum(sizes) <= crowd[0][1].budget.usable
        for spec, (_, plan) in zip(shared, crowd):
            assert (spec.kv_cache_bytes or 0) <= max(plan.budget.pool, 0)
    assert refused < 10


def test_folders_are_planned_together(tmp_path: Path) -> None:
    specs = []
    for name, config in itertools.product("ab", [QWEN3_06B]):
        folder = write_config(tmp_path / name, config)
        specs.append(EngineSpec(model=name, path=folder))
    pairs = plan_together(specs, gpu_machine("L4"))
    total = sum(taken(spec, plan) for spec, plan in pairs)
    assert total <= pairs[0][1].budget.total
    assert all(
        plan.fits and plan.pool_tokens * plan.kv_token_bytes <= spec.kv_cache_bytes for spec, plan in pairs
    )
    (alone,) = plan_together(specs[:1], gpu_machine("L4"))
    assert alone[0] is specs[0]
    assert alone[1].pool_tokens > pairs[0][1].pool_tokens
