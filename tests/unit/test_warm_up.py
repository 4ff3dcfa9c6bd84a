"""Warm-up steps leave nothing behind: the same answers and books as without them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.config.spec import EngineSpec
from headrace.engines.build import build
from headrace.execution.warm_up import _spread, warm_up
from headrace.types import Request, SamplingParams
from support.tiny_folder import write_llama


def tokens(core: Any, prompts: list[tuple[int, ...]]) -> dict[str, list[int]]:
    kinds: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.0, "seed": 5, "top_p": 0.9}]
    core.add(
        Request(
            id=str(i),
            token_ids=prompt,
            sampling=SamplingParams(max_tokens=9, ignore_eos=True, **kinds[i % 2]),
        )
        for i, prompt in enumerate(prompts)
    )
    found: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    while core.has_work():
        for output in core.step():
            assert not output.error, output
            found[output.request_id] += output.token_ids
    core.idle()
    return found


@pytest.mark.parametrize("max_num_seqs", [1, 5])
def test_same_answers(max_num_seqs: int, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    write_llama(tmp_path)
    spec = EngineSpec(
        model=str(tmp_path), path=tmp_path, max_num_seqs=max_num_seqs, kv_cache_bytes=1 << 20, overlap=False
    )
    rng = random.Random(2)
    prompts = [tuple(rng.randrange(300) for _ in range(rng.randint(1, 70))) for _ in range(7)]
    cold, _ = build(spec)
    warm, ready = build(spec)
    warm_up(warm.runner, step_tokens=128, max_num_seqs=max_num_seqs, max_model_len=ready.max_model_len)
    assert tokens(warm, prompts) == tokens(cold, prompts)
    assert warm.stats().prompt_tokens == cold.stats().prompt_tokens
    assert warm.stats().blocks_cached == cold.stats().blocks_cached


@pytest.mark.parametrize(
    ("total", "longest", "most", "lengths"),
    [(10, 4, 9, [4, 4, 2]), (10, 4, 2, [4, 4]), (8, 8, 1, [8]), (8192, 511, 4, [511] * 4), (3, 9, 5, [3])],
)
def test_lengths_of_the_longest_step(total: int, longest: int, most: int, lengths: list[int]) -> None:
    assert _spread(total, min(longest, total), most) == lengths
