"""The sampler against transformers' processors and against the distributions it promises."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

import headrace.execution.sampler as sampler_module
from headrace.execution.sampler import Masks, Sampler, race_keys
from headrace.kernels.sampling import forbid_rows
from headrace.kernels.sampling.reference import race_times
from headrace.kvcache.blocks import BlockPool
from headrace.kvcache.table import BlockTable
from headrace.scheduling.plan import Chunk
from headrace.scheduling.sequence import Sequence
from headrace.types import Request, SamplingParams

VOCAB = 1500


def chunk(
    row: int, params: SamplingParams, token_ids: tuple[int, ...] = (1, 2, 3), output: tuple[int, ...] = ()
) -> Chunk:
    request = Request(id=f"r{row}", token_ids=token_ids, sampling=params)
    sequence = Sequence(
        request, BlockTable(BlockPool(2), 4, b""), arrival=row, limit=10_000, eos_ids=frozenset()
    )
    sequence.token_ids.extend(output)
    sequence.row = row
    return Chunk(sequence, len(sequence.token_ids) - 1, 1, True, False, row, 0)


def sample(logits: torch.Tensor, chunks: list[Chunk]) -> list[int]:
    sampler = Sampler(len(chunks), torch.device("cpu"))
    for c in chunks:
        sampler.admit(c.sequence)
    return sampler.sample(logits.clone(), chunks).tokens.tolist()


def support(logits: torch.Tensor, params: dict[str, float], draws: int = 1200) -> set[int]:
    """Tokens that come up for some seed."""
    chunks = [chunk(i, SamplingParams(seed=i, **params)) for i in range(draws)]  # type: ignore[arg-type]
    return set(sample(logits.expand(draws, -1), chunks))


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 7},
        {"top_p": 0.6},
        {"top_p": 0.35, "temperature": 1.7},
        {"min_p": 0.15},
        {"top_k": 12, "top_p": 0.8},
        {"top_k": 20, "min_p": 0.1, "temperature": 0.7},
        {"top_k": 2000, "top_p": 0.5},
    ],
)
def test_filters_keep_what_transformers_keeps(params: dict[str, float]) -> None:
    from transformers.generation.logits_process import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0)) * 4
    scores = TemperatureLogitsWarper(float(params.get("temperature", 1.0)))(None, logits)
    for key, warper in (
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
        ("min_p", MinPLogitsWarper),
    ):
        if key in params:
            scores = warper(params[key])(None, scores)
    kept = set(torch.isfinite(scores[0]).nonzero()[:, 0].tolist())
    probs = torch.softmax(scores[0], -1)
    seen = support(logits, params)
    assert seen <= kept
    assert {t for t in kept if probs[t] > 0.01} <= seen


def test_top_p_over_a_flat_distribution_needs_more_than_the_candidates() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, :900] = 1.0
    seen = support(logits, {"top_p": 0.5}, draws=4000)
    assert len(seen) > 512
    assert max(seen) < 900  # ties at the floor stay, the lower class does not


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]])
    draws = 20_000
    chunks = [chunk(i, SamplingParams(seed=i)) for i in range(draws)]
    counts = np.bincount(sample(logits.expand(draws, -1), chunks), minlength=5) / draws
    assert np.abs(counts - torch.softmax(logits[0], -1).numpy()).max() < 0.015


def test_race_times_are_independent_exponentials() -> None:
    def times(seeds: np.ndarray, positions: np.ndarray, vocab: int) -> np.ndarray:
        return race_times(torch.from_numpy(race_keys(seeds, positions)), vocab).double().numpy()

    by_token = times(np.full(2, 7, np.uint64), np.arange(2), 100_000)
    by_position = times(np.full(50_000, 7, np.uint64), np.arange(50_000), 2)
    by_seed = times(np.arange(50_000, dtype=np.uint64), np.zeros(50_000, np.int64), 2)
    for numbers in (*by_token, *by_position.T, *by_seed.T):
        assert numbers.min() > 0
        assert abs(numbers.mean() - 1) < 0.02
        assert abs(numbers.var() - 1) < 0.06
        for rare in (1e-3, 0.1, 1.0, 5.0):
            expected = 1 - np.exp(-rare)
            spread = (expected * (1 - expected) / len(numbers)) ** 0.5
            assert abs((numbers < rare).mean() - expected) < 5 * spread
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03
    for pair in (by_token, by_position.T, by_seed.T):
        assert abs(np.corrcoef(*pair)[0, 1]) < 0.03


def test_a_draw_survives_rounding() -> None:
    """Chunks, neighbours and a warm cache change logits by some 1e-5; that must not change seeded tokens."""
    random_numbers = torch.Generator().manual_seed(4)
    logits = torch.randn(1, 50_000, generator=random_numbers) * 2.5
    chunks = [chunk(i, SamplingParams(seed=i)) for i in range(150)]
    noise = torch.randn(150, 50_000, generator=random_numbers) * 1e-5
    rows = logits.expand(150, -1)
    assert sample(rows, chunks) == sample(rows + noise, chunks)


def test_penalties_equal_their_definitions() -> None:
    rng = random.Random(1)
    prompt = tuple(rng.randrange(VOCAB) for _ in range(30))
    output = tuple(rng.choice(prompt[:5]) for _ in range(12))
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(2)) * 3
    params = SamplingParams(
        temperature=0.0, repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=0.3, logprobs=1
    )
    expected = logits[0].clone()
    for token in set(prompt + output):
        expected[token] = expected[token] / 1.3 if expected[token] > 0 else expected[token] * 1.3
    for token in set(output):
        expected[token] -= 0.7 + 0.3 * output.count(token)
    sampler = Sampler(1, torch.device("cpu"))
    c = chunk(0, params, prompt, output)
    sampler.admit(c.sequence)
    adjusted = logits.clone()
    sampled = sampler.sample(adjusted, [c])
    assert torch.allclose(adjusted[0], expected, atol=1e-5)
    assert sampled.tokens.tolist() == [int(expected.argmax())]
    assert sampled.scored == [0]
    assert sampled.scores is not None
    (entry,) = sampled.scores.read(sampled.tokens.tolist())
    assert entry.logprob == pytest.approx(
        float(torch.log_softmax(logits[0], -1)[int(expected.argmax())]), abs=1e-5
    )
    assert entry.rank == int((logits[0] > logits[0, entry.token_id]).sum()) + 1
    assert len(entry.top) == 1


def test_masks_forbid() -> None:
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(3))
    bits = torch.zeros(2, -(-VOCAB // 32), dtype=torch.int32)
    bits[:, 0] = 1 << 5 | 1 << 9
    bits[0, 1] = -(2**31)  # token 63: the sign bit
    chunks = [chunk(0, SamplingParams(seed=1)), chunk(1, SamplingParams(temperature=0.0))]
    sampler = Sampler(2, torch.device("cpu"))
    for c in chunks:
        sampler.admit(c.sequence)
    masks = Masks(torch.tensor([1, 0]), bits)
    tokens = sampler.sample(logits.clone(), chunks, masks).tokens.tolist()
    assert tokens[1] in (5, 9, 63)
    assert tokens[0] in (5, 9)
    masked = logits.clone()
    forbid_rows(masked, masks.rows, masks.bits)
    assert torch.isfinite(masked[0]).nonzero()[:, 0].tolist() == [5, 9]
    assert torch.isfinite(masked[1]).nonzero()[:, 0].tolist() == [5, 9, 63]
    best = masked[1].argmax()
    chunks = [chunk(0, SamplingParams(temperature=0.0)), chunk(1, SamplingParams(temperature=0.0))]
    for c in chunks:
        sampler.admit(c.sequence)
    assert sampler.sample(logits.clone(), chunks, masks).tokens[1] == best
    tokens = sampler.sample(logits.clone(), chunks, Masks(torch.tensor([1]), bits[1:])).tokens.tolist()
    assert tokens[1] == (5 if logits[1, 5] > logits[1, 9] else 9)


def test_many_rows_are_drawn_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(11, VOCAB, generator=torch.Generator().manual_seed(8))
    chunks = [chunk(i, SamplingParams(seed=i, top_p=0.7, temperature=float(i % 3))) for i in range(11)]
    expected = sample(logits, chunks)
    monkeypatch.setattr("headrace.kernels.sampling.reference.DRAW_ELEMENTS", 2 * VOCAB)
    assert sample(logits, chunks) == expected


def test_scores_are_made_for_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(9, VOCAB, generator=torch.Generator().manual_seed(5))
    found = []
    for elements in (1 << 23, 4 * VOCAB):
        monkeypatch.setattr(sampler_module, "SCORE_ELEMENTS", elements)
        chunks = [chunk(i, SamplingParams(seed=i, logprobs=i % 3)) for i in range(9)]
        sampler = Sampler(9, torch.device("cpu"))
        for c in chunks:
            sampler.admit(c.sequence)
        sampled = sampler.sample(logits.clone(), chunks)
        assert sampled.scores is not None
        found.append(sampled.scores.read(sampled.tokens.tolist()))
    assert found[0] == found[1]


def test_a_history_follows_its_sequence() -> None:
    """Counts grow with the output; another sequence in the same row starts afresh."""
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0, frequency_penalty=0.5)
    sampler = Sampler(1, torch.device("cpu"))
    first, second = chunk(0, params, (1, 2), (2,)), chunk(0, params, (5,), ())
    sampler.admit(first.sequence)

    def edited(c: Chunk) -> list[float]:
        logits = torch.full((1, 8), 4.0)
        sampler.sample(logits, [c])
        return logits[0].tolist()

    assert edited(first) == [4.0, 2.0, 1.5, 4.0, 4.0, 4.0, 4.0, 4.0]
    first.sequence.token_ids += [2, 7]
    assert edited(first) == [4.0, 2.0, 1.0, 4.0, 4.0, 4.0, 4.0, 1.5]
    sampler.admit(second.sequence)
    assert edited(second) == [4.0, 4.0, 4.0, 4.0, 4.0, 2.0, 4.0, 4.0]


def test_bans_are_biases() -> None:
    params = SamplingParams(
        temperature=0.0,
        min_tokens=3,
        stop_token_ids=(2,),
        logit_bias={4: 1.5, 2: 9.0},
        bad_words=((6, 7), (1,)),
    )
    c = chunk(0, params, (5, 6))
    sampler = Sampler(1, torch.device("cpu"))
    sampler.admit(c.sequence)
    logits = torch.zeros(1, 9)
    assert sampler.sample(logits, [c]).tokens.tolist() == [4]
    low = -float("inf")
    assert logits[0].tolist() == [0.0, low, low, 0.0, 1.5, 0.0, 0.0, low, 0.0]
