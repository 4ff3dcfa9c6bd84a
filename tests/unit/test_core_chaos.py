"""Everything that can happen to requests at once: whoever is left is right, and nothing is left behind."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from torch import Tensor

from headrace.engines.generate import GenerateCore
from headrace.execution.constraints.compiler import ConstraintCompiler
from headrace.execution.constraints.table import ConstraintTable
from headrace.layers.packed import PackedBatch
from headrace.types import ConstraintSpec, FinishReason, Output, Request, SamplingParams
from support.byte_vocabulary import EOS, VOCAB, tokenizer_json
from support.prefix_model import PrefixModel, make_core


class Fragile(PrefixModel):
    """Breaks in every so many-th step (0: in none)."""

    def __init__(self, every: int) -> None:
        super().__init__(VOCAB)
        self.every, self.calls = every, 0

    def __call__(self, batch: PackedBatch) -> Tensor:
        self.calls += 1
        if self.every and self.calls % self.every == 0:
            raise RuntimeError("injected")
        return super().__call__(batch)


def core_with(overlap: bool, every: int) -> GenerateCore:
    core = make_core(
        vocab_size=VOCAB,
        eos_ids=(EOS,),
        overlap=overlap,
        num_blocks=24,
        max_model_len=64,
        max_num_seqs=5,
        max_num_batched_tokens=11,
    )
    core.runner.model = Fragile(every)
    compiler = ConstraintCompiler(tokenizer_json, vocab_size=VOCAB, eos_ids=(EOS,))
    core.constraints = ConstraintTable(compiler, core.runner.device)
    core.scheduler.is_ready = core.constraints.is_ready
    return core


KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"repetition_penalty": 1.2, "logprobs": 1},
    {"prompt_logprobs": 1},
    {"constraint": ConstraintSpec("regex", "[ab]{3,9}-[0-9]{2}")},
    {"constraint": ConstraintSpec("regex", "[")},
    {"bad_words": ((5, 6),), "min_tokens": 2},
]


def make_request(i: int, rng: random.Random, shared: list[int], now: float) -> Request:
    prompt = shared[: rng.choice([0, 9])] + [rng.randrange(97) for _ in range(rng.randint(1, 30))]
    kind = KINDS[i % len(KINDS)]
    return Request(
        id=f"r{i}",
        token_ids=tuple(prompt),
        priority=rng.randrange(2),
        deadline=now - 1.0 if rng.random() < 0.05 else None,
        sampling=SamplingParams(max_tokens=rng.randint(2, 20), seed=i, **kind),
    )


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])
@pytest.mark.parametrize("seed", range(4))
def test_who_is_left_is_right_and_nothing_is_left(seed: int, overlap: bool) -> None:
    rng = random.Random(seed)
    core = core_with(overlap, every=40)
    shared = [rng.randrange(97) for _ in range(12)]
    requests: dict[str, Request] = {}
    found: dict[str, list[Output]] = {}
    aborted: set[str] = set()
    end = time.monotonic() + 60
    while len(requests) < 80 or core.has_work():
        assert time.monotonic() < end, "the core did not drain"
        if len(requests) < 80 and rng.random() < 0.5:
            one = make_request(len(requests), rng, shared, time.monotonic())
            requests[one.id] = one
            core.add([one])
        if requests and rng.random() < 0.1:
            gone = rng.choice(list(requests))
            aborted.add(gone)
            core.abort([gone])
        for output in core.step():
            found.setdefault(output.request_id, []).append(output)
        core.scheduler.check()
    assert core.scheduler.pool.account().owned == 0
    assert not core.scheduler.sequences
    assert sorted(core.scheduler._rows) == list(range(5))
    assert not core.constraints._live
    assert not core.constraints._compiling
    assert not core._prompt_logprobs
    assert core.scheduler.num_preemptions > 0
    core.close()
    quiet = core_with(False, every=0)
    finished = 0
    for name, request in requests.items():
        outputs = found.get(name, [])
        ends = [output for output in outputs if output.finish_reason is not None]
        assert ends == outputs[-1:] or (name in aborted and not ends), name
        if not ends or ends[0].finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
            continue
        finished += 1
        quiet.add([request])
        alone: list[Output] = []
        while quiet.has_work():
            alone += quiet.step()
        tokens = [[token for output in some for token in output.token_ids] for some in (outputs, alone)]
        assert tokens[0] == tokens[1], name
        assert ends[0].finish_reason == alone[-1].finish_reason
    quiet.close()
    assert finished > 20


def test_what_is_refused_is_not_run() -> None:
    """A core without grammars answers a request for one, and keeps nothing of it."""
    core = make_core()
    constraint = ConstraintSpec("regex", "a+")
    core.add([Request(id="r", token_ids=(1,), sampling=SamplingParams(max_tokens=3, constraint=constraint))])
    assert not core.scheduler.sequences
    (output,) = core.step()
    assert output.finish_reason is FinishReason.ERROR
    assert not core.has_work()
