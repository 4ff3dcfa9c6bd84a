"""A request's tokens do not depend on its company: batch, chunking, prefix cache, overlap or preemption."""

from __future__ import annotations

import random

import pytest
import torch

from headrace.engines.generate import GenerateCore
from headrace.execution.runner import Runner
from headrace.kvcache.blocks import BlockPool
from headrace.kvcache.pool import allocate_caches
from headrace.models.decoder import DecoderModel
from headrace.models.loading import load_decoder, random_weights
from headrace.models.registry import read_config
from headrace.scheduling.scheduler import Scheduler
from headrace.types import Request, SamplingParams
from support.cores import drain

VOCAB = 211
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
CONFIGS = {
    "llama": {**TINY, "architectures": ["LlamaForCausalLM"], "rope_theta": 10000.0},
    "qwen3": {**TINY, "architectures": ["Qwen3ForCausalLM"], "rope_theta": 10000.0},
    "qwen2-moe": {
        **TINY,
        "architectures": ["Qwen2MoeForCausalLM"],
        "rope_theta": 10000.0,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 40,
    },
    "gemma2": {
        **TINY,
        "architectures": ["Gemma2ForCausalLM"],
        "rope_theta": 10000.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 24,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
}
SETUPS = {
    "together": {},
    "chunks of 7": {"max_num_batched_tokens": 7},
    "overlapped": {"overlap": True},
    "overlapped chunks": {"overlap": True, "max_num_batched_tokens": 7},
    "preempting": {"num_blocks": 70},
    "overlapped preempting": {"overlap": True, "num_blocks": 70},
}


def make_core(
    model: DecoderModel, *, overlap: bool = False, max_num_batched_tokens: int = 512, num_blocks: int = 600
) -> GenerateCore:
    layout = [(layer.num_kv_heads, layer.head_dim) for layer in model.kv_layout]
    caches = allocate_caches(layout, num_blocks, 4, torch.float32, torch.device("cpu"))
    for cache in caches:  # whatever is not written must not be read
        cache.k.fill_(float("nan"))
        cache.v.fill_(float("nan"))
    runner = Runner(
        model, caches, device=torch.device("cpu"), block_size=4, max_num_seqs=40, max_model_len=256
    )
    scheduler = Scheduler(
        BlockPool(num_blocks),
        block_size=4,
        max_num_seqs=40,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=256,
    )
    return GenerateCore(runner, scheduler, overlap=overlap)


def make_requests(vocab: int, count: int, max_tokens: int) -> list[Request]:
    rng = random.Random(5)
    shared = tuple(rng.randrange(vocab) for _ in range(30))
    requests = []
    for i in range(count):
        prompt = (shared if i % 3 == 0 else ()) + tuple(
            rng.randrange(vocab) for _ in range(rng.randint(1, 40))
        )
        sampling = SamplingParams(max_tokens=max_tokens, temperature=float(i % 2), seed=i)
        requests.append(Request(id=f"r{i}", token_ids=prompt, sampling=sampling))
    return requests


def check(
    model: DecoderModel, vocab: int, setup: dict[str, object], count: int, max_tokens: int, alone: int
) -> None:
    requests = make_requests(vocab, count, max_tokens)
    core = make_core(model, **setup)  # type: ignore[arg-type]
    cold = drain(core, requests)
    warm = drain(core, requests)
    assert cold == warm
    if "num_blocks" in setup:
        assert core.scheduler.num_preemptions > 0
    else:
        assert core.scheduler.prefix_hits > 0
    for request in requests[:alone]:
        assert drain(make_core(model), [request])[request.id] == cold[request.id]


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS.keys())
@pytest.mark.parametrize("family", CONFIGS)
def test_tiny_models(family: str, setup: dict[str, object]) -> None:
    model = random_weights(read_config(CONFIGS[family]), dtype=torch.float32, device="cpu", seed=3)
    for parameter in model.parameters():  # spread the logits, as trained weights do
        if parameter.dim() > 1:
            parameter.data.mul_(8)
    check(model, VOCAB, setup, count=33, max_tokens=16, alone=9)


@pytest.mark.slow
@pytest.mark.models
@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS.keys())
def test_packaged_model(setup: dict[str, object], smollm2) -> None:  # type: ignore[no-untyped-def]
    model = load_decoder(smollm2.config, smollm2, dtype=torch.float32, device="cpu")
    check(model, 49152, setup, count=33, max_tokens=12, alone=4)
