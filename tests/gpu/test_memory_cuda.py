"""After start a core asks the driver for no memory, whatever it is asked to do."""

from __future__ import annotations

import functools
import gc
import json
import multiprocessing
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from headrace.config.plan.facts import Facts
from headrace.config.plan.shape import read_shape
from headrace.config.plan.weights import expected_tensors
from headrace.config.spec import EngineSpec
from headrace.engines.build import build
from headrace.engines.plan import plan_for
from headrace.engines.weights import load_weights, open_weights
from headrace.execution.capture import GraphMemory, borrowed
from headrace.execution.device_memory import grow, num_device_allocations
from headrace.execution.gather import gather, held_tensors
from headrace.types import ConstraintSpec, EncodeParams, EncodeTask, Request, SamplingParams
from parity.encoders import add_pooling, make
from support.byte_vocabulary import tokenizer_json

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


def apart(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test in a process of its own, as cores are served: an earlier one leaves pieces in segments it took."""

    @functools.wraps(test)
    def run_apart(**arguments: Any) -> None:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            process.submit(_run_here, test.__name__, arguments).result()

    return run_apart


def _run_here(name: str, arguments: dict[str, Any]) -> None:
    globals()[name].__wrapped__(**arguments)


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
# As Qwen3-0.6B but for its depth and vocabulary, so that kernels are shared with what is measured.
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "vocab_size": 32768, "hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128,
    "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True,
    "max_position_embeddings": 16384, "dtype": "bfloat16",
}  # fmt: skip


# Logits that are changed after the head, of a vocabulary so large that one copy of them is 250 MiB for 256 rows; heads
# of 256 with a soft cap of their own, and layers of two kinds.
CAPPED = {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 8192, "vocab_size": 256000,
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 4096, "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "tie_word_embeddings": True, "dtype": "bfloat16",
}  # fmt: skip
MIXTURE = {
    **CONFIG, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 16,
    "num_experts_per_tok": 4, "moe_intermediate_size": 768, "norm_topk_prob": True,
}  # fmt: skip
# Eight layers, so that what converting leaves between them would be seen.
DEEPER = {**CONFIG, "num_hidden_layers": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model"), CONFIG)


@pytest.fixture(scope="module")
def capped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("capped"), CAPPED)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("mixture"), MIXTURE)


@pytest.fixture(scope="module")
def deeper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("deeper"), DEEPER)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("untied"), {**CONFIG, "tie_word_embeddings": False})


def write(found: Path, config: dict[str, Any]) -> Path:
    (found / "config.json").write_text(json.dumps(config))
    shape = read_shape(Facts(where="", config=config, container="config"))
    generator = torch.Generator("cuda").manual_seed(1)
    tensors = {}
    for name, tensor in expected_tensors(shape, 2).items():
        value = torch.ones(tensor.shape, dtype=torch.bfloat16, device="cuda")
        tensors[name] = (value if value.dim() == 1 else value.normal_(0, 0.05, generator=generator)).cpu()
    save_file(tensors, found / "model.safetensors")
    return found


def generate(
    core: Any, prompts: list[tuple[int, ...]], name: str, kinds: list[dict[str, Any]]
) -> dict[str, list[int]]:
    """Tokens by request; every request must end well."""
    found: dict[str, list[int]] = {f"{name}-{i}": [] for i in range(len(prompts))}
    core.add(
        Request(
            id=f"{name}-{i}",
            token_ids=prompt,
            sampling=SamplingParams(max_tokens=5 + i % 20, ignore_eos=True, **kinds[i % len(kinds)]),
        )
        for i, prompt in enumerate(prompts)
    )
    while core.has_work():
        for output in core.step():
            assert not output.error, output
            found[output.request_id] += output.token_ids
    assert all(len(tokens) == 5 + i % 20 for i, tokens in enumerate(found.values()))
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 700},
        {"quantization": "fp8", "max_num_seqs": 4},
        {"quantization": "fp8_block"},
        {"eager": True},
        {"kv_cache_dtype": "fp8", "overlap": False, "max_num_seqs": 4},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
@apart
def test_generation_asks_for_none(settings: dict[str, Any], folder: Path) -> None:
    """And graphs that are captured between others leave the answers of a prompt alone as they were."""
    spec = EngineSpec(
        model=str(folder), path=folder, kv_cache_bytes=400 * MIB, prefix_caching=False,
        **{"max_num_seqs": 48, **settings},
    )  # fmt: skip
    core, ready = build(spec)
    before = num_device_allocations(CUDA)
    rng = random.Random(0)

    def prompts(count: int, shortest: int, longest: int) -> list[tuple[int, ...]]:
        lengths = [rng.randint(shortest, longest) for _ in range(count)]
        return [tuple(rng.randrange(ready.vocab_size) for _ in range(length)) for length in lengths]

    fixed = prompts(2, 20, 30), prompts(1, 9000, 9001)
    first = [generate(core, some, "first", KINDS[:1]) for some in fixed]
    for count, longest in ((1, 30), (8, 900), (48, 60), (100, 20), (3, 9500)):
        generate(core, prompts(count, 2, longest), "other", KINDS)
    again = [generate(core, some, "first", KINDS[:1]) for some in fixed]
    assert again == first
    assert num_device_allocations(CUDA) == before, num_device_allocations(CUDA) - before
    core.close()


@pytest.mark.parametrize("kind", ["", "fp8", "fp4"])
@apart
def test_mixtures_hold_what_was_planned_and_ask_for_none(kind: str, mixture: Path) -> None:
    spec = EngineSpec(
        model=str(mixture), path=mixture, quantization=kind, kv_cache_bytes=400 * MIB, max_num_seqs=32
    )
    budget = plan_for(spec).budget
    core, ready = build(spec)
    assert ready.engine == "moe"
    assert ready.summary["weight_bytes"] == pytest.approx(budget.weights, rel=0.005)
    held, planned = torch.cuda.memory_reserved(), budget.weights + budget.activations + budget.pool
    assert abs(held - planned) < 96 * MIB, (held / MIB, planned / MIB)
    before = num_device_allocations(CUDA)
    rng = random.Random(0)
    for count, length in ((1, 30), (8, 900), (32, 60), (3, 9000), (32, 1)):
        prompts = [tuple(rng.randrange(ready.vocab_size) for _ in range(length)) for _ in range(count)]
        generate(core, prompts, "other", KINDS)
    assert num_device_allocations(CUDA) == before, num_device_allocations(CUDA) - before
    core.close()


@apart
def test_large_vocabularies_with_a_soft_cap_ask_for_none(capped: Path) -> None:
    spec = EngineSpec(model=str(capped), path=capped, kv_cache_bytes=400 * MIB, max_num_seqs=256)
    plan = plan_for(spec)
    core, ready = build(spec)
    assert ready.summary["weight_bytes"] == plan.budget.weights
    before = num_device_allocations(CUDA)
    rng = random.Random(0)
    for count, length in ((1, 30), (8, 900), (1, 8000), (256, 40), (256, 1)):
        for kinds in (KINDS[:1], KINDS):
            prompts = [tuple(rng.randrange(ready.vocab_size) for _ in range(length)) for _ in range(count)]
            generate(core, prompts, "other", kinds)
    assert num_device_allocations(CUDA) == before, num_device_allocations(CUDA) - before
    core.close()


@apart
def test_structured_output_asks_for_none(deeper: Path) -> None:
    """Masks of every row, beside rows without, and with log-probabilities of what they were before."""
    (deeper / "tokenizer.json").write_text(tokenizer_json())
    spec = EngineSpec(model=str(deeper), path=deeper, kv_cache_bytes=400 * MIB, max_num_seqs=48)
    core, _ = build(spec)
    before = num_device_allocations(CUDA)
    schema = ConstraintSpec("json_schema", '{"type": "array", "items": {"type": "integer"}}')
    rng = random.Random(0)
    for count, free in ((1, 0), (48, 0), (60, 3)):
        requests = [
            Request(
                id=f"{count}-{i}",
                token_ids=tuple(rng.randrange(200) for _ in range(rng.randint(1, 100))),
                sampling=SamplingParams(
                    max_tokens=12,
                    temperature=float(i % 2),
                    logprobs=2 if i % 4 == 1 else None,
                    constraint=None if free and i % free == 0 else schema,
                ),
            )
            for i in range(count)
        ]
        assert run(core, requests) == count
    assert num_device_allocations(CUDA) == before, num_device_allocations(CUDA) - before
    core.close()


@pytest.mark.parametrize("kind", ["fp8", "fp8_block", "fp4", "mxfp4", "int8", "int4"])
def test_converting_leaves_nothing_between_weights(kind: str, deeper: Path) -> None:
    """The weights' bytes, and of the allocator's own no more than its rounding; and they are what they were."""
    spec = EngineSpec(model=str(deeper), path=deeper, quantization=kind)
    others = torch.cuda.memory_reserved()
    model = load_weights(spec, open_weights(spec), torch.bfloat16, CUDA)
    before = [(tensor, tensor.clone()) for tensor in held_tensors(model)]
    assert torch.cuda.memory_reserved() - torch.cuda.memory_allocated() > 0
    wanted = [(tensor, value.cpu()) for tensor, value in before]
    del before
    gather(model)
    storages = {
        s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in held_tensors(model) if t.is_cuda)
    }
    reserved = torch.cuda.memory_reserved() - others
    assert sum(storages.values()) <= reserved < sum(storages.values()) + 28 * MIB  # of many small tensors
    for tensor, value in wanted:
        assert torch.equal(tensor.cpu().contiguous().view(torch.uint8), value.contiguous().view(torch.uint8))


@pytest.mark.parametrize("kind", ["int8", "int4"])
@apart
def test_a_quantized_head_of_its_own(kind: str, untied: Path) -> None:
    """Integers convert it, too; steps of more rows than its kernel takes unpack it, in memory that was planned."""
    spec = EngineSpec(
        model=str(untied), path=untied, quantization=kind, kv_cache_bytes=400 * MIB, max_num_seqs=100
    )
    budget = plan_for(spec).budget
    core, ready = build(spec)
    held, planned = torch.cuda.memory_reserved(), budget.weights + budget.activations + budget.pool
    assert abs(held - planned) < 96 * MIB, (held / MIB, planned / MIB)
    before = num_device_allocations(CUDA)
    rng = random.Random(0)
    for count in (1, 20, 100):
        for kinds in (KINDS[:1], KINDS):
            prompts = [tuple(rng.randrange(ready.vocab_size) for _ in range(9)) for _ in range(count)]
            generate(core, prompts, "other", kinds)
    assert num_device_allocations(CUDA) == before, num_device_allocations(CUDA) - before
    core.close()


@pytest.mark.parametrize("kind", ["", "fp8", "fp8_block", "fp4", "int8", "int4"])
@apart
def test_a_core_holds_what_was_planned(kind: str, deeper: Path) -> None:
    spec = EngineSpec(
        model=str(deeper), path=deeper, quantization=kind, kv_cache_bytes=400 * MIB, max_num_seqs=32
    )
    budget = plan_for(spec).budget
    core, ready = build(spec)
    assert ready.summary["weight_bytes"] == pytest.approx(budget.weights, rel=0.005)
    held, planned = torch.cuda.memory_reserved(), budget.weights + budget.activations + budget.pool
    assert abs(held - planned) < 96 * MIB, (held / MIB, planned / MIB)
    core.close()


@pytest.mark.parametrize("family", ["bert"])
@apart
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
    assert num_device_allocations(CUDA) == before, num_device_allocations(CUDA) - before


def test_growing_takes_once() -> None:
    torch.cuda.empty_cache()  # what earlier tests left would be used first
    grow(68 * MIB, CUDA, small=4 * MIB)
    before = num_device_allocations(CUDA)
    large = [torch.empty(3 * MIB, dtype=torch.uint8, device="cuda") for _ in range(20)]
    small = [torch.empty(1000, dtype=torch.uint8, device="cuda") for _ in range(3000)]
    assert num_device_allocations(CUDA) == before, num_device_allocations(CUDA) - before
    more = torch.empty(256 * MIB, dtype=torch.uint8, device="cuda")
    assert num_device_allocations(CUDA) > before
    del large, small, more


def test_graphs_share_memory_and_lend_results() -> None:
    """Results of one graph hold until the next one runs, and no graph takes memory of its own."""
    memory = GraphMemory(CUDA)
    memory.grow(64 * MIB, 4 * MIB)
    grow(64 * MIB, CUDA, small=4 * MIB)  # for what runs before a capture
    x = torch.zeros(MIB, device="cuda")

    def blank() -> None:
        x.zero_()

    memory.capture(blank)  # from its first graph on torch keeps the state of its random numbers on the device
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
    assert num_device_allocations(CUDA) == before, num_device_allocations(CUDA) - before
    assert len({results[0].data_ptr() for _, results, _ in graphs}) == 1
    for value in (0.0, 4.0):
        x.fill_(value)
        for replay, results, factor in graphs:
            replay()
            assert torch.equal(results[0], torch.full_like(x, ((value + 1) * factor) ** 2))
