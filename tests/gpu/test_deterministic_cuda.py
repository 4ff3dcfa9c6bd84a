"""Deterministic mode on a GPU: the same tokens, and log-probabilities to the last bit, whatever a request's company."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch

from headrace.engines.generate import GenerateCore
from headrace.engines.generate_build import _prefix_regime
from headrace.execution.graphs import GraphRunner
from headrace.execution.runner import Runner
from headrace.kernels.attention.fp4 import FP4
from headrace.kvcache.blocks import BlockPool
from headrace.kvcache.pool import allocate_caches
from headrace.layers.linear import FixedLinear
from headrace.models.decoder import DecoderModel
from headrace.models.loading import random_weights
from headrace.models.registry import read_config
from headrace.scheduling.scheduler import Scheduler
from headrace.types import Request, SamplingParams, TokenLogprobs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
VOCAB = 1003
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 1152,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}
CONFIGS = {
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": False},
    "olmo2": {"architectures": ["Olmo2ForCausalLM"], "tie_word_embeddings": False},
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "head_dim": 128,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 50,
        "query_pre_attn_scalar": 128,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "head_dim": 256,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 50,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 100.0,
    },
    "phi3": {
        "architectures": ["Phi3ForCausalLM"],
        "hidden_size": 384,
        "num_attention_heads": 4,
        "head_dim": 96,
        "sliding_window": 40,
        "tie_word_embeddings": False,
    },
    "llama-dynamic": {
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 64,
        "rope_scaling": {"rope_type": "dynamic", "factor": 16.0},
        "tie_word_embeddings": False,
    },
    "qwen3-moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "moe_intermediate_size": 192,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "tie_word_embeddings": False,
    },
    "gpt-oss": {
        "architectures": ["GptOssForCausalLM"],
        "intermediate_size": 320,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "sliding_window": 50,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 128,
            "truncate": False,
        },
        "tie_word_embeddings": False,
    },
}
SETUPS: dict[str, dict[str, Any]] = {
    "together": {},
    "one by one": {"rows": 1},
    "chunks of 37": {"step_tokens": 37, "rows": 30},
    "overlapped": {"overlap": True, "step_tokens": 300},
    "preempting": {"num_blocks": 130, "overlap": True},
    "no graphs": {"eager": True, "step_tokens": 160},
}
Answer = tuple[list[int], list[TokenLogprobs]]


@functools.cache
def build_model(family: str, dtype: torch.dtype) -> DecoderModel:
    model = random_weights(read_config({**SIZES, **CONFIGS[family]}), dtype=dtype, device="cuda")
    generator = torch.Generator(device="cuda").manual_seed(1)
    for parameter in model.parameters():  # spread the logits, as trained weights do
        if parameter.dim() > 1:
            parameter.data.normal_(0, 1.5 * parameter.shape[-1] ** -0.5, generator=generator)
    FixedLinear.fix(model)
    return model


def make_core(
    model: DecoderModel,
    *,
    rows: int = 64,
    step_tokens: int = 2048,
    overlap: bool = False,
    num_blocks: int = 4000,
    eager: bool = False,
    cache: torch.dtype | None = None,
) -> GenerateCore:
    device = torch.device("cuda")
    layout = [(layer.num_kv_heads, layer.head_dim) for layer in model.kv_layout]
    caches = allocate_caches(layout, num_blocks, 16, cache or model.embed.weight.dtype, device)
    for layer in caches:  # whatever is not written must not be read: NaN in every type
        layer.k.view(torch.uint8).fill_(255)
        layer.v.view(torch.uint8).fill_(255)
    sizes = {"device": device, "block_size": 16, "max_num_seqs": rows, "max_model_len": 1024, "fixed": True}
    by_length = model.config.rope_boundary is not None
    runner: Runner
    if eager or by_length:
        runner = Runner(model, caches, rope_by_length=by_length, **sizes)  # type: ignore[arg-type]
    else:
        runner = GraphRunner(model, caches, **sizes)  # type: ignore[arg-type]
    scheduler = Scheduler(
        BlockPool(num_blocks),
        block_size=16,
        max_num_seqs=rows,
        max_num_batched_tokens=step_tokens,
        max_model_len=1024,
        prefix_regime=_prefix_regime(model),
    )
    return GenerateCore(runner, scheduler, overlap=overlap)


def make_requests(count: int, longest: int, max_tokens: int, sampled: bool) -> list[Request]:
    rng = random.Random(5)
    shared = tuple(rng.randrange(VOCAB) for _ in range(70))
    requests = []
    for i in range(count):
        prompt = (shared if i % 3 == 0 else ()) + tuple(
            rng.randrange(VOCAB) for _ in range(rng.randint(1, longest))
        )
        kinds = [{"temperature": 0.0}, {"top_p": 0.8}, {"top_k": 20}, {"repetition_penalty": 1.2}]
        options = kinds[i % 4 if sampled else 0]
        sampling = SamplingParams(
            max_tokens=rng.randint(max_tokens // 2, max_tokens),
            ignore_eos=True,
            seed=i,
            logprobs=2,
            **options,
        )
        requests.append(Request(id=f"r{i}", token_ids=prompt, sampling=sampling))
    return requests


def run(core: GenerateCore, requests: list[Request]) -> dict[str, Answer]:
    core.add(requests)
    found: dict[str, Answer] = {request.id: ([], []) for request in requests}
    while core.has_work():
        for output in core.step():
            assert not output.error
            tokens, logprobs = found[output.request_id]
            tokens.extend(output.token_ids)
            logprobs.extend(output.logprobs)
    core.scheduler.check()
    return found


def differing(found: dict[str, Answer], expected: dict[str, Answer]) -> list[str]:
    return [id for id in found if found[id] != expected[id]]


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", CONFIGS)
def test_families(family: str, sampled: bool) -> None:
    """Company, chunks, a warm prefix cache, preemption and graphs."""
    model = build_model(family, torch.bfloat16)
    requests = make_requests(30, 150, 24, sampled)
    expected = run(make_core(model), requests)
    for name, setup in SETUPS.items():
        core = make_core(model, **setup)
        for temperature in ("cold", "warm"):
            assert not differing(run(core, requests), expected), f"{name}, {temperature}"
        if name == "preempting":
            assert core.scheduler.num_preemptions > 0
        else:
            assert core.scheduler.prefix_hits > 0


@pytest.mark.parametrize("cache", [torch.float8_e4m3fn, FP4], ids=["fp8", "fp4"])
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_caches_of_few_bits(family: str, cache: torch.dtype) -> None:
    model = build_model(family, torch.bfloat16)
    requests = make_requests(20, 150, 16, family == "qwen3")
    expected = run(make_core(model, cache=cache), requests)
    for name in ("chunks of 37", "preempting", "no graphs"):
        core = make_core(model, cache=cache, **SETUPS[name])
        for temperature in ("cold", "warm"):
            assert not differing(run(core, requests), expected), f"{name}, {temperature}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_alone_or_among_256(dtype: torch.dtype) -> None:
    model = build_model("qwen3", dtype)
    requests = make_requests(256, 60, 16, dtype == torch.bfloat16)
    together = run(make_core(model, rows=256, step_tokens=8192, overlap=True), requests)
    core = make_core(model, rows=256, step_tokens=8192)
    alone: dict[str, Answer] = {}
    for request in requests[::23]:
        alone.update(run(core, [request]))
    assert not differing(alone, together)
