"""Graphs share memory: none may read what another one left there, nor what a kernel before it has not yet written."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace.engines.generate import GenerateCore
from headrace.execution import graph_functions
from headrace.execution.capture import _Lent
from headrace.execution.graph_keys import GraphKey
from headrace.execution.graphs import GraphRunner, GraphStep
from headrace.kernels.step import StepInputs, begin_step
from headrace.kvcache.blocks import BlockPool
from headrace.kvcache.pool import allocate_caches
from headrace.models.decoder import DecoderModel
from headrace.models.decoder_fast import reason_against
from headrace.models.loading import random_weights
from headrace.models.registry import read_config
from headrace.scheduling.scheduler import Scheduler
from headrace.types import Request, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
VOCAB, BLOCK, LENGTH = 1000, 16, 1024
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": LENGTH,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True},
    "qwen3-moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 192,
        "norm_topk_prob": True,
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 50,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 64,
        "rope_local_base_freq": 100.0,
    },
}


def build_model(family: str) -> DecoderModel:
    model = random_weights(read_config({**SIZES, **CONFIGS[family]}), dtype=torch.bfloat16, device="cuda")
    generator = torch.Generator(device="cuda").manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 1.5 * parameter.shape[-1] ** -0.5, generator=generator)
    return model


def build_runner(model: DecoderModel, rows: int, num_blocks: int) -> GraphRunner:
    layout = [(layer.num_kv_heads, layer.head_dim) for layer in model.kv_layout]
    caches = allocate_caches(layout, num_blocks, BLOCK, torch.bfloat16, CUDA)
    for cache in caches:
        cache.k.normal_()
        cache.v.normal_()
    return GraphRunner(model, caches, device=CUDA, block_size=BLOCK, max_num_seqs=rows, max_model_len=LENGTH)


@pytest.mark.parametrize("batch", [1, 2, 40, 100])
def test_a_step_sees_its_own_lengths_and_tables(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention reads them before it waits for the kernels before it: they must have been written by then."""
    recorded: list[StepInputs] = []

    def record(*args: Any) -> StepInputs:
        recorded.append(begin_step(*args))
        return recorded[-1]

    monkeypatch.setattr(graph_functions, "begin_step", record)
    model = build_model("qwen3")
    assert reason_against(model) is None
    runner = build_runner(model, batch, batch * LENGTH // BLOCK + 1)
    width = LENGTH // BLOCK
    blocks = torch.randperm(batch * width, generator=torch.Generator().manual_seed(0)) + 1
    tables = blocks.view(batch, width).int().cuda()
    runner._device_tables[:batch] = tables
    graph = runner._graph(GraphKey(batch, batch, "logits"))
    rng = random.Random(0)
    positions = torch.tensor([rng.randrange(40, LENGTH) for _ in range(batch)])
    packed = torch.zeros(4, batch, dtype=torch.int32)
    packed[0], packed[1] = torch.arange(batch), positions
    packed[2] = torch.randint(VOCAB, (batch,), generator=torch.Generator().manual_seed(0))
    packed[3] = tables.cpu()[torch.arange(batch), positions // BLOCK]
    given = packed.flatten().cuda()
    rows, places = torch.arange(batch).cuda(), (positions // BLOCK).cuda()

    def step() -> Tensor:
        graph.input.copy_(given)
        graph.replay()
        return graph.output[0]

    step()
    torch.cuda.synchronize()
    expected = step().clone()
    lens = recorded[-1].seq_lens  # of the capture
    assert expected.isfinite().all()
    wrong = torch.zeros((), dtype=torch.int64, device=CUDA)
    for _ in range(1000):
        lens.fill_(1)
        runner._device_tables[rows, places] = 0
        wrong += (step() != expected).any()
    assert not int(wrong)


def poison(runner: GraphRunner) -> int:
    """Fill what is free of the graphs' memory with numbers that are no index of anything; returns its bytes."""
    assert runner._memory is not None
    filled = 0
    for segment in torch.cuda.memory_snapshot():
        if tuple(segment["segment_pool_id"]) != tuple(runner._memory.pool.id):
            continue
        for block in segment["blocks"]:
            if block["state"] == "inactive":
                lent = _Lent(torch.empty(0, dtype=torch.uint8))
                lent.__cuda_array_interface__ |= {
                    "shape": (block["size"],),
                    "data": (block["address"], False),
                }
                torch.as_tensor(lent, device=CUDA).fill_(0x7F)
                filled += block["size"]
    return filled


@pytest.mark.parametrize("family", CONFIGS)
def test_no_graph_reads_what_others_left(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(family)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {},
        {"top_k": 20, "top_p": 0.9},
        {"logprobs": 2, "repetition_penalty": 1.1},
    ]

    def answers(dirty: bool) -> dict[str, list[int]]:
        runner = build_runner(model, 9, 700)
        torch.manual_seed(3)
        for cache in runner.caches:
            cache.k.normal_()
            cache.v.normal_()
        if dirty:
            original, filled = runner._replay, []

            def replay(step: GraphStep) -> Tensor:
                runner._graph(step.key)
                filled.append(poison(runner))
                return original(step)

            monkeypatch.setattr(runner, "_replay", replay)
        scheduler = Scheduler(
            BlockPool(700), block_size=BLOCK, max_num_seqs=9, max_num_batched_tokens=300, max_model_len=LENGTH
        )
        core = GenerateCore(runner, scheduler, overlap=False)
        found: dict[str, list[int]] = {}
        for many in (1, 2, 9, 14):  # alone, together, more than rows
            for kind in (None, *range(4)):
                rng = random.Random(many)
                core.add(
                    Request(
                        id=f"{many}-{kind}-{i}",
                        token_ids=tuple(rng.randrange(VOCAB) for _ in range(rng.choice([3, 40, 500]))),
                        sampling=SamplingParams(
                            max_tokens=4, ignore_eos=True, seed=i, **kinds[i % 4 if kind is None else kind]
                        ),
                    )
                    for i in range(many)
                )
                while core.has_work():
                    for output in core.step():
                        assert not output.error, output
                        found.setdefault(output.request_id, []).extend(output.token_ids)
        assert not dirty or min(filled) > 0
        core.close()
        return found

    assert answers(dirty=True) == answers(dirty=False)


@pytest.mark.parametrize("hasty", [False, True], ids=["as it is", "nobody waits for chunks"])
def test_a_device_that_lags_behind_gets_each_step_whole(hasty: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a long prompt yield no token to wait for: their inputs must not be overwritten before they are copied.

    (They once were, and steps that read half of another step's input reached outside the KV pool.)
    """
    model = build_model("qwen3")
    prompt = tuple(random.Random(0).randrange(VOCAB) for _ in range(LENGTH - 20))

    def answer() -> list[int]:
        runner = build_runner(model, 3, 200)
        scheduler = Scheduler(
            BlockPool(200), block_size=BLOCK, max_num_seqs=3, max_num_batched_tokens=70, max_model_len=LENGTH
        )
        core = GenerateCore(runner, scheduler, overlap=True)
        tokens: list[int] = []
        for name in ("first", "again"):  # captured on the way, then replayed
            sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
            core.add([Request(id=name, token_ids=prompt, sampling=sampling, cache_salt=name)])
            while core.has_work():
                for output in core.step():
                    assert not output.error, output
                    tokens += output.token_ids
        assert core.scheduler.prefix_hits == 0
        core.close()
        return tokens

    expected = answer()
    replay, send = GraphRunner._replay, GraphRunner._send

    def late(runner: GraphRunner, step: GraphStep) -> Tensor:
        torch.cuda._sleep(4_000_000)
        return replay(runner, step)

    def forgetful(runner: GraphRunner, step: GraphStep) -> None:
        if step.sampled is not None:
            send(runner, step)

    monkeypatch.setattr(GraphRunner, "_replay", late)
    if hasty:
        monkeypatch.setattr(GraphRunner, "_send", forgetful)
    assert answer() == expected
    assert len(expected) == 16
