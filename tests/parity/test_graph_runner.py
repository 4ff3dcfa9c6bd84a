"""Decode steps as graphs give the tokens of the plain Runner: fused and plain, greedy and sampled, any company.

Without a GPU the captured function runs directly, the fused one under Triton's interpreter.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from msgspec import structs

from headrace.config.plan.scratch import DECODE_GRAPHS, Load, decode_graphs
from headrace.config.plan.shape import ModelShape
from headrace.engines.generate import GenerateCore
from headrace.execution.graph_keys import ladder
from headrace.execution.graphs import GraphRunner
from headrace.execution.runner import Runner
from headrace.kernels import dispatch
from headrace.kernels.attention.decode_shapes import is_long
from headrace.kvcache.blocks import BlockPool
from headrace.kvcache.pool import allocate_caches
from headrace.layers.linear import FixedLinear
from headrace.models.decoder import DecoderModel
from headrace.models.decoder_fast import reason_against
from headrace.models.loading import random_weights
from headrace.models.registry import read_config
from headrace.scheduling.plan import StepPlan
from headrace.scheduling.scheduler import Scheduler
from headrace.types import Request, SamplingParams
from support.cores import drain
from triton_device import DEVICE, ON_GPU

VOCAB = 203
BLOCK = 4
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
CONFIGS = {
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "hidden_act": "silu", "tie_word_embeddings": True},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "tie_word_embeddings": False},
    "qwen3-moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_act": "silu",
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "qwen2-moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "hidden_act": "silu",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 64,
        "mlp_only_layers": [1],
        "tie_word_embeddings": True,
    },
    "gpt-oss": {
        "architectures": ["GptOssForCausalLM"],
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "sliding_window": 9,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        "tie_word_embeddings": False,
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 9,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 16,
        "rope_local_base_freq": 100.0,
    },
}


def build_model(name: str, dtype: torch.dtype = torch.float32) -> DecoderModel:
    model = random_weights(read_config({**TINY, **CONFIGS[name]}), dtype=dtype, device=DEVICE)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # enough for every part to show in the tokens
        noise = torch.randn(parameter.shape, generator=generator).to(DEVICE)
        parameter.data += noise * (0.1 if parameter.dim() > 1 else 0.3)
    for module in model.modules():
        if hasattr(module, "stacked"):
            module.finish()
    return model


def build_core(
    model: DecoderModel,
    *,
    graphs: bool,
    fast: bool = True,
    fixed: bool = False,
    overlap: bool = False,
    chunk: int = 64,
) -> GenerateCore:
    num_blocks = 120
    layout = [(layer.num_kv_heads, layer.head_dim) for layer in model.kv_layout]
    caches = allocate_caches(layout, num_blocks, BLOCK, model.embed.weight.dtype, DEVICE)
    for cache in caches:
        cache.k.fill_(torch.nan)
        cache.v.fill_(torch.nan)
    sizes = {"device": DEVICE, "block_size": BLOCK, "max_num_seqs": 6, "max_model_len": 128}
    runner = (
        GraphRunner(model, caches, fast=fast, fixed=fixed, **sizes)
        if graphs
        else Runner(model, caches, **sizes)
    )
    scheduler = Scheduler(
        BlockPool(num_blocks),
        block_size=BLOCK,
        max_num_seqs=6,
        max_num_batched_tokens=chunk,
        max_model_len=128,
    )
    return GenerateCore(runner, scheduler, overlap=overlap)


DRAWN = {
    "drawn": [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.7}],
    "filtered": [{"top_p": 0.8}, {"top_k": 7, "temperature": 1.5}, {"temperature": 0.0}, {"min_p": 0.1}, {}],
}


def requests(count: int, output: int, sampled: bool, kinds: str = "") -> list[Request]:
    rng = random.Random(count)
    made = []
    shared = tuple(rng.randrange(VOCAB) for _ in range(8))
    for i in range(count):
        prompt = shared[: rng.choice([0, 8])] + tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 14)))
        kind = i % 4 if sampled else 0
        options = [
            {"temperature": 0.0},
            {"temperature": 1.0, "seed": i},
            {"temperature": 0.0, "repetition_penalty": 1.3},
            {"temperature": 0.8, "top_k": 5, "seed": i, "logprobs": 2},
        ][kind]
        if kinds:
            options = {"seed": i, **DRAWN[kinds][i % len(DRAWN[kinds])]}
        params = SamplingParams(max_tokens=rng.randint(2, output), ignore_eos=True, **options)
        made.append(Request(id=str(i), token_ids=prompt, sampling=params))
    return made


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "mixed"])
@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])
def test_unfused_graphs(overlap: bool, sampled: bool) -> None:
    model = build_model("gemma3")
    assert reason_against(model) == "norm"
    work = requests(9, 24, sampled)
    expected = drain(build_core(model, graphs=False), work)
    core = build_core(model, graphs=True, overlap=overlap, chunk=16)
    assert drain(core, work) == expected
    again = [Request(id=r.id, token_ids=r.token_ids, sampling=r.sampling) for r in work]
    assert drain(core, again) == expected  # a warm prefix cache admits rows into decode steps


@pytest.mark.parametrize(
    ("name", "sampled"),
    [
        ("qwen3", False),
        ("qwen3", True),
        ("qwen2", False),
        ("qwen2", True),
        ("qwen3-moe", False),
        ("qwen2-moe", True),
        ("gpt-oss", False),
    ],
)
def test_fused_graphs(name: str, sampled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(name)
    assert reason_against(model) is None
    count, length = (9, 40) if ON_GPU else (4, 5)
    work = requests(count, length, sampled)
    expected = drain(build_core(model, graphs=False), work)
    core = build_core(model, graphs=True, overlap=True)
    assert drain(core, work) == expected
    monkeypatch.setattr("headrace.models.decoder_fast.STREAM_ROWS", 1)
    assert drain(build_core(model, graphs=True), work) == expected
    monkeypatch.setattr("headrace.models.decoder_fast.SMALL_ROWS", 1)
    assert drain(build_core(model, graphs=True), work) == expected


def test_long_sequences_have_graphs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps pass from one cut of attention to the other while sequences grow and end."""
    model = build_model("qwen3")
    lengths = []

    def is_long(num_heads: int, head_dim: int, longest: int) -> bool:
        assert num_heads % 2 == 0 and head_dim == 16
        lengths.append(longest)
        return longest > (30 if ON_GPU else 14)

    monkeypatch.setattr("headrace.execution.graph_keys.is_long", is_long)
    work = requests(9, 40, True) if ON_GPU else requests(3, 7, False)
    expected = drain(build_core(model, graphs=False), work)
    core = build_core(model, graphs=True)
    assert drain(core, work) == expected
    assert max(lengths) == max(len(r.token_ids) + r.sampling.max_tokens for r in work) - 1
    assert isinstance(core.runner, GraphRunner)
    decode = [key for key in core.runner._graphs if key.kind != "mixed"]
    assert {key.long for key in decode} == {False, True}


def test_every_decode_graph_is_planned() -> None:
    """What the plan counts is what a runner may capture."""
    shape = ModelShape(
        layers=1, hidden=1, heads=8, kv_heads=8, head_dim=128, intermediate=1, vocab=1, context=1
    )
    for rows in (1, 3, 40, 256, 300, 1024):
        load = Load(tokens=64, rows=rows, context=4096, dtype_bytes=2, cuda=True, graphs=True)
        keys = {
            (size, kind, is_long(size * 8, 128, longest))
            for size in ladder(DECODE_GRAPHS, rows)
            for kind in ("tokens", "drawn", "filtered", "logits")
            for longest in (1, 4096)
        }
        assert decode_graphs(shape, load) == len(keys)


@pytest.mark.parametrize("kinds", DRAWN)
def test_drawing_graphs(kinds: str) -> None:
    """Steps that draw within their graph draw what the sampler draws behind the plain forward."""
    model = build_model("qwen3" if ON_GPU else "gemma3")
    work = requests(9, 40 if ON_GPU else 12, True, kinds)
    expected = drain(build_core(model, graphs=False), work)
    core = build_core(model, graphs=True, overlap=True, chunk=16)
    assert drain(core, work) == expected
    assert isinstance(core.runner, GraphRunner)
    assert kinds in {key.kind for key in core.runner._graphs}


@pytest.mark.parametrize("kinds", ["", *DRAWN], ids=["greedy", *DRAWN])
def test_repeated_steps(kinds: str) -> None:
    """Several steps for one turn of the host give the tokens of one at a time, and end where they end."""
    model = build_model("qwen3" if ON_GPU else "gemma3")
    work = requests(6, 40, bool(kinds), kinds)
    whole = drain(build_core(model, graphs=False), work)
    for i, request in enumerate(work[::2]):  # some end early, anywhere within a turn
        stop = whole[request.id][len(whole[request.id]) // 2]
        sampling = structs.replace(request.sampling, stop_token_ids=(stop,))
        work[2 * i] = structs.replace(request, sampling=sampling)
    expected = drain(build_core(model, graphs=False), work)
    assert sum(map(len, expected.values())) < sum(map(len, whole.values()))
    core = build_core(model, graphs=True, overlap=True, chunk=16)
    core._pace = dict.fromkeys(range(7), 1e-3)  # a device that is fast enough to be left alone for long
    turns: list[int] = []
    schedule = core.scheduler.repeat

    def repeat(plan: StepPlan, times: int) -> None:
        schedule(plan, times)
        turns.append(plan.repeats)

    core.scheduler.repeat = repeat  # type: ignore[method-assign]
    assert drain(core, work) == expected
    assert max(turns) == BLOCK
    assert core.stats().steps > len(turns)


@pytest.fixture
def triton_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels of GPUs on whatever device there is."""
    monkeypatch.setattr(dispatch, "_FILES", {"cpu": "triton", "cuda": "triton"})
    dispatch.kernel.cache_clear()
    yield
    dispatch.kernel.cache_clear()


@pytest.mark.usefixtures("triton_everywhere")
def test_fixed_order() -> None:
    """Deterministic mode: the same tokens alone and together, whole and in chunks."""
    model = build_model("qwen2", torch.bfloat16 if ON_GPU else torch.float32)
    FixedLinear.fix(model)
    work = requests(9 if ON_GPU else 8, 30 if ON_GPU else 4, sampled=False)
    expected = drain(build_core(model, graphs=True, fixed=True, overlap=True, chunk=16), work)
    for request in work[:: 1 if ON_GPU else 3]:
        alone = drain(build_core(model, graphs=True, fixed=True), [request])
        assert alone[request.id] == expected[request.id]


def test_a_broken_row_ends_alone() -> None:
    """A row with logits that are not finite ends with an error; the others never notice."""
    model = build_model("qwen2")
    model.embed.weight.data[7] = torch.nan
    work = [
        Request(
            id=str(i),
            token_ids=(t, 3, *range(10, 10 + i)),
            sampling=SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True),
        )
        for i, t in enumerate([5, 7, 9])
    ]
    core = build_core(model, graphs=True, fast=ON_GPU, overlap=True)
    core.add(work)
    ended = {}
    while core.has_work():
        for output in core.step():
            if output.finish_reason is not None:
                ended[output.request_id] = output.finish_reason
    assert ended == {"0": "length", "1": "error", "2": "length"}
