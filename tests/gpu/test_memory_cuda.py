"""After start a core asks the driver for no memory, whatever it is asked to do."""

from __future__ import annotations

import gc
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.config.spec import EngineSpec
from headrace.engines.build import build
from headrace.execution.capture import GraphMemory, borrowed
from headrace.execution.device_memory import grow, num_device_allocations
from headrace.types import EncodeParams, EncodeTask, Request, SamplingParams
from parity.encoders import add_pooling, make
from support.tiny_folder import write_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
MIB = 1 << 20


@pytest.fixture(autouse=True)
def alone() -> None:
    """What earlier tests left in the allocator's cache would hide that memory is asked for."""
    gc.collect()
    torch.cuda.empty_cache()


def run(core: Any, requests: list[Request]) -> int:
    core.add(requests)
    done = 0
    while core.has_work():
        for output in core.step():
            assert not output.error, output
            done += getattr(output, "finish_reason", True) is not None
    return done


KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
    {"temperature": 1.0, "top_p": 0.999},
    {"temperature": 0.0, "logprobs": 5},
    {"temperature": 0.0, "prompt_logprobs": 2},
    {"temperature": 1.0, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.1},
    {"temperature": 1.0, "logit_bias": {3: 2.0}, "min_tokens": 3},
]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"eager": True},
        {"quantization": "fp8"},
        {"kv_cache_dtype": "fp8", "max_num_batched_tokens": 300},
        {"deterministic": True, "overlap": False},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_generation_asks_for_none(settings: dict[str, Any], tmp_path: Path) -> None:
    write_llama(
        tmp_path, vocab_size=5000, hidden_size=256, intermediate_size=512, num_attention_heads=4, head_dim=64,
        num_key_value_heads=2, max_position_embeddings=2048,
    )  # fmt: skip
    spec = EngineSpec(
        model=str(tmp_path), path=tmp_path, kv_cache_bytes=64 * MIB, max_num_seqs=48, **settings
    )
    core, ready = build(spec)
    before = num_device_allocations(CUDA)
    rng = random.Random(0)
    for count, longest in ((1, 30), (8, 900), (48, 60), (100, 20), (3, 1900)):
        requests = [
            Request(
                id=f"{count}-{i}",
                token_ids=tuple(rng.randrange(ready.vocab_size) for _ in range(rng.randint(2, longest))),
                sampling=SamplingParams(
                    max_tokens=rng.randint(1, 24), ignore_eos=True, **KINDS[i % len(KINDS)]
                ),
            )
            for i in range(count)
        ]
        assert run(core, requests) == count
    assert num_device_allocations(CUDA) == before
    core.close()


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_encoding_asks_for_none(family: str, tmp_path: Path) -> None:
    make(tmp_path, family)
    add_pooling(tmp_path)
    core, ready = build(EngineSpec(model=str(tmp_path), path=tmp_path, max_num_seqs=64))
    before = num_device_allocations(CUDA)
    rng = random.Random(0)
    for count in (1, 5, 64, 700):
        requests = [
            Request(
                id=str(i),
                token_ids=tuple(
                    rng.randrange(ready.vocab_size) for _ in range(rng.randint(1, ready.max_model_len))
                ),
                encode=EncodeParams(task=EncodeTask.EMBED_ALL if i % 7 == 3 else EncodeTask.EMBED),
            )
            for i in range(count)
        ]
        assert run(core, requests) == count
    assert num_device_allocations(CUDA) == before


def test_growing_takes_once() -> None:
    grow(64 * MIB, CUDA, small=4 * MIB)
    before = num_device_allocations(CUDA)
    large = [torch.empty(3 * MIB, dtype=torch.uint8, device="cuda") for _ in range(20)]
    small = [torch.empty(1000, dtype=torch.uint8, device="cuda") for _ in range(3000)]
    assert num_device_allocations(CUDA) == before
    more = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    assert num_device_allocations(CUDA) > before
    del large, small, more


def test_graphs_share_memory_and_lend_results() -> None:
    """Results of one graph hold until the next one runs, and no graph takes memory of its own."""
    memory = GraphMemory(CUDA)
    memory.grow(64 * MIB)
    x = torch.zeros(MIB, device="cuda")
    graphs = []
    before = num_device_allocations(CUDA)
    for factor in (2.0, 3.0, 5.0):
        results: list[torch.Tensor] = []

        def work(factor: float = factor, results: list[torch.Tensor] = results) -> None:
            results.clear()
            results.append(((x + 1) * factor).square())

        replay = memory.capture(work)
        results[:] = [borrowed(results[0])]
        graphs.append((replay, results, factor))
    assert num_device_allocations(CUDA) == before
    assert len({results[0].data_ptr() for _, results, _ in graphs}) == 1
    for value in (0.0, 4.0):
        x.fill_(value)
        for replay, results, factor in graphs:
            replay()
            assert torch.equal(results[0], torch.full_like(x, ((value + 1) * factor) ** 2))
