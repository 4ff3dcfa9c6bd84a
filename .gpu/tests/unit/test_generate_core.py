"""The token machine over a model whose answer depends on every cached key."""

from __future__ import annotations

import random

import pytest

from headrace.engines.generate import GenerateCore
from headrace.types import FinishReason, Output, Request, SamplingParams
from support.prefix_model import PrefixModel, make_core

SETUPS = {
    "roomy": {},
    "chunks of 7": {"max_num_batched_tokens": 7},
    "preempting": {"num_blocks": 34, "max_model_len": 64},
    "no prefix cache": {"prefix_caching": False},
    "few rows": {"max_num_seqs": 2},
    "block of 1": {"block_size": 1, "num_blocks": 300},
}


def drain(core: GenerateCore, limit: int = 20_000) -> dict[str, list[Output]]:
    outputs: dict[str, list[Output]] = {}
    for _ in range(limit):
        if not core.has_work():
            break
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
    assert not core.has_work(), "the core did not drain"
    core.scheduler.check()
    assert core.scheduler.pool.account().owned == 0
    return outputs


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def prompts(seed: int, count: int) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    shared = [rng.randrange(97) for _ in range(12)]
    return [
        tuple((shared if rng.random() < 0.5 else []) + [rng.randrange(97) for _ in range(rng.randint(1, 25))])
        for _ in range(count)
    ]


def request(i: int, prompt: tuple[int, ...], **sampling: object) -> Request:
    params = {"max_tokens": 20, "temperature": 0.0, **sampling}
    return Request(id=f"r{i}", token_ids=prompt, sampling=SamplingParams(**params))  # type: ignore[arg-type]


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])
@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS.keys())
def test_greedy_equals_the_definition(setup: dict[str, object], overlap: bool) -> None:
    core = make_core(overlap=overlap, **setup)  # type: ignore[arg-type]
    model = PrefixModel()
    for round_ in range(2):  # the second time with a warm prefix cache
        core.add(request(i, p) for i, p in enumerate(prompts(1, 12)))
        outputs = drain(core)
        for i, prompt in enumerate(prompts(1, 12)):
            expected = list(prompt)
            for _ in range(20):
                expected.append(model.next_greedy(expected))
            assert tokens(outputs[f"r{i}"]) == expected[len(prompt) :], (round_, i)
            assert outputs[f"r{i}"][-1].finish_reason is FinishReason.LENGTH
    if setup == SETUPS["preempting"]:
        assert core.scheduler.num_preemptions > 0
    if core.scheduler.prefix_caching and not setup:
        assert core.scheduler.prefix_hits > 0


SAMPLINGS: list[dict[str, object]] = [
    {"temperature": 1.0, "seed": 11},
    {"temperature": 0.8, "seed": 12, "top_k": 5},
    {"temperature": 1.3, "seed": 13, "top_p": 0.7},
    {"temperature": 1.0, "seed": 14, "min_p": 0.2},
    {"temperature": 1.0, "seed": 15, "repetition_penalty": 1.4, "top_p": 0.9, "top_k": 20},
    {"temperature": 1.0, "seed": 16, "presence_penalty": 1.5, "frequency_penalty": 0.4},
    {"temperature": 1.0, "seed": 17, "logit_bias": {3: 4.0, 5: -100.0}, "min_tokens": 5},
    {"temperature": 0.0, "frequency_penalty": 2.0},
]


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])
@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS.keys())
def test_seeded_tokens_do_not_depend_on_the_company(setup: dict[str, object], overlap: bool) -> None:
    requests = [request(i, p, **SAMPLINGS[i % len(SAMPLINGS)]) for i, p in enumerate(prompts(2, 16))]
    alone = {}
    for r in requests:
        core = make_core(eos_ids=(4,))
        core.add([r])
        alone.update(drain(core))
    core = make_core(overlap=overlap, eos_ids=(4,), **setup)  # type: ignore[arg-type]
    core.add(requests)
    together = drain(core)
    assert {k: tokens(v) for k, v in together.items()} == {k: tokens(v) for k, v in alone.items()}
    assert {k: v[-1].finish_reason for k, v in together.items()} == {
        k: v[-1].finish_reason for k, v in alone.items()
    }


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])
def test_random_aborts_leave_the_account_as_it_was(overlap: bool) -> None:
    rng = random.Random(3)
    core = make_core(overlap=overlap, num_blocks=40, max_model_len=64, max_num_batched_tokens=9)
    before = core.scheduler.pool.account().total
    live: list[str] = []
    for i in range(400):
        prompt = tuple(rng.randrange(97) for _ in range(rng.randint(1, 30)))
        core.add(
            [request(i, prompt, max_tokens=rng.randint(1, 20), priority=0)]
            if False
            else [
                Request(
                    id=f"r{i}",
                    token_ids=prompt,
                    priority=rng.randrange(3),
                    sampling=SamplingParams(max_tokens=rng.randint(1, 20), temperature=0.0),
                ),
            ]
        )
        live.append(f"r{i}")
        for _ in range(rng.randint(0, 2)):
            core.step()
        if rng.random() < 0.6:
            core.abort([rng.choice(live)])
        core.scheduler.check()
    drain(core)
    account = core.scheduler.pool.account()
    assert (account.owned, account.total) == (0, before)
    assert core.scheduler.num_preemptions > 0


def test_stop_ids_and_min_tokens() -> None:
    core = make_core(eos_ids=(4,))
    core.add(
        [
            request(0, (1, 2, 3), logit_bias={4: 100.0}, min_tokens=3),
            request(1, (1, 2, 3), logit_bias={9: 100.0}, stop_token_ids=(9,)),
        ]
    )
    outputs = drain(core)
    assert tokens(outputs["r0"])[-1] == 4
    assert len(tokens(outputs["r0"])) == 4
    assert outputs["r0"][-1].stop_token == 4
    assert outputs["r0"][-1].finish_reason is FinishReason.STOP
    assert tokens(outputs["r1"]) == [9]


def test_ignore_eos_and_bad_words() -> None:
    core = make_core(eos_ids=(4,))
    core.add([request(0, (1, 2, 3), logit_bias={4: 100.0}, ignore_eos=True, max_tokens=6)])
    assert tokens(drain(core)["r0"]) == [4] * 6
    core.add([request(0, (1, 2, 3), logit_bias={7: 50.0, 8: 40.0}, bad_words=((7, 7), (8, 7)), max_tokens=6)])
    got = tokens(drain(core)["r0"])
    assert [7, 7] not in [got[i : i + 2] for i in range(5)]
    assert [8, 7] not in [got[i : i + 2] for i in range(5)]
    assert got[0] == 7


def test_logprobs_are_those_of_the_raw_distribution() -> None:
    import torch

    core = make_core(max_num_batched_tokens=5)
    prompt = tuple(range(1, 18))
    core.add([request(0, prompt, logprobs=3, prompt_logprobs=2, max_tokens=4, temperature=1.0, seed=5)])
    outputs = drain(core)["r0"]
    model = PrefixModel()
    seen = list(prompt)
    for output in outputs:
        from support.prefix_model import checksum

        expected = torch.log_softmax(model.logits(torch.tensor([[checksum(seen)]]))[0], -1)
        (entry,) = output.logprobs
        assert entry.logprob == pytest.approx(float(expected[entry.token_id]), abs=1e-5)
        assert entry.rank == int((expected > expected[entry.token_id]).sum()) + 1
        assert [t for t, _ in entry.top] == expected.topk(3).indices.tolist()
        seen.append(entry.token_id)
    assert [e.token_id for e in outputs[0].prompt_logprobs] == list(prompt[1:])
    assert all(len(e.top) == 2 for e in outputs[0].prompt_logprobs)


def test_a_request_that_can_never_run_is_refused_alone() -> None:
    core = make_core(max_model_len=32)
    core.add([request(0, tuple(range(40))), request(1, (1, 2, 3))])
    outputs = drain(core)
    assert outputs["r0"][0].finish_reason is FinishReason.ERROR
    assert "40 tokens" in outputs["r0"][0].error
    assert len(tokens(outputs["r1"])) == 20


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])
def test_a_step_that_breaks_costs_only_its_own_sequences(overlap: bool) -> None:
    core = make_core(overlap=overlap, max_num_seqs=1)
    model = core.runner.model
    assert isinstance(model, PrefixModel)
    original, calls = PrefixModel.__call__, 0

    class Breaking(PrefixModel):
        def __call__(self, batch):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            if calls == 3:
                raise RuntimeError("injected")
            return original(self, batch)

    core.runner.model = Breaking()
    core.add([request(0, (1, 2, 3)), request(1, (4, 5, 6))])
    outputs = drain(core)
    assert outputs["r0"][-1].finish_reason is FinishReason.ERROR
    assert "injected" in outputs["r0"][-1].error
    assert outputs["r1"][-1].finish_reason is FinishReason.LENGTH
    assert len(tokens(outputs["r1"])) == 20


def test_not_finite_logits_fail_one_request() -> None:
    core = make_core()

    class Poisoned(PrefixModel):
        def logits(self, hidden):  # type: ignore[no-untyped-def]
            out = super().logits(hidden)
            out[0] = float("nan")
            return out

    core.runner.model = Poisoned()
    core.add([request(0, (1, 2, 3)), request(1, (4, 5, 6), max_tokens=1, temperature=1.0)])
    outputs = drain(core)
    assert outputs["r0"][-1].finish_reason is FinishReason.ERROR
    assert outputs["r1"][-1].finish_reason is FinishReason.LENGTH


def test_priority_goes_first() -> None:
    core = make_core(max_num_seqs=1)
    core.add([request(0, (1, 2))])
    core.step()
    core.add(
        [
            Request(id="late", token_ids=(5, 6), sampling=SamplingParams(max_tokens=2), priority=5),
            Request(id="soon", token_ids=(7, 8), sampling=SamplingParams(max_tokens=2), priority=-1),
        ]
    )
    order = [o.request_id for _ in range(60) for o in core.step() if o.finish_reason]
    assert order == ["r0", "soon", "late"]


def test_a_passed_deadline_ends_a_request() -> None:
    core = make_core()
    core.add([Request(id="late", token_ids=(5, 6), sampling=SamplingParams(), deadline=0.001)])
    (output,) = drain(core)["late"]
    assert output.finish_reason is FinishReason.ABORT
