"""Sampling kernels against plain torch: filters, ties, masks, edits, races and log-probabilities."""

from __future__ import annotations

import pytest
import torch

from headrace.execution.sampler import race_keys
from headrace.kernels.sampling import Draws, Edits, reference
from headrace.kernels.sampling import triton as fast
from triton_device import DEVICE, ON_GPU, randn

VOCAB = 20_011 if ON_GPU else 401


def make_draws(params: list[dict[str, float]], seed: int = 0) -> Draws:
    """One row for each; a row's random numbers depend on its place."""
    columns = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    values = {name: [row.get(name, default) for row in params] for name, default in columns.items()}
    positions = torch.arange(len(params)).numpy()
    keys = race_keys((positions + seed).astype("uint64"), positions)
    return Draws(
        torch.tensor(values["temperature"], dtype=torch.float32, device=DEVICE),
        torch.tensor(values["top_k"], dtype=torch.int32, device=DEVICE),
        *(torch.tensor(values[name], dtype=torch.float32, device=DEVICE) for name in ("top_p", "min_p")),
        torch.from_numpy(keys).to(DEVICE),
        any(values["top_k"]),
        min(values["top_p"]) < 1.0,
        any(values["min_p"]),
    )


FILTERS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 600, "temperature": 1.5},
    {"top_k": VOCAB},
    {"top_k": 10 * VOCAB},
    {"top_p": 0.6},
    {"top_p": 0.999},
    {"top_p": 1e-6},
    {"top_p": 0.5, "temperature": 3.0},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 9, "top_p": 1e-3, "min_p": 0.1},
    {"top_k": 50, "top_p": 0.95, "min_p": 0.01, "temperature": 2.0},
    {"temperature": 0.01, "top_p": 0.9},
    {"temperature": 0.0, "top_k": 5, "top_p": 0.5},
]


@pytest.mark.parametrize(("kind", "scale"), [("random", 4.0), ("ties", 0.3), ("masked", 4.0)])
def test_draws(kind: str, scale: float) -> None:
    logits = randn(len(FILTERS), VOCAB, dtype=torch.float32, seed=1, scale=scale)
    if kind == "ties":
        logits = (logits * 2).round() / 2
    if kind == "masked":
        logits[
            :, torch.rand(VOCAB, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.98
        ] = -torch.inf
    draws = make_draws(FILTERS)
    expected = reference.draw_rows(logits.clone(), draws)
    last = torch.full((99,), 7, device=DEVICE)
    rows = torch.arange(40, 40 + len(FILTERS), dtype=torch.int32, device=DEVICE)
    got = fast.draw_rows(logits, draws, last_tokens=last, rows=rows)
    assert torch.equal(got, expected)
    assert torch.equal(last[40 : 40 + len(FILTERS)], got)
    assert (last[:40] == 7).all()
    assert got[1] == int(logits[1].argmax())
    assert logits[4, got[4]] >= logits[4].topk(7).values[-1]


@pytest.mark.skipif(
    not ON_GPU, reason="takes minutes under the interpreter; test_draws compares with the reference"
)
@pytest.mark.parametrize(
    "params", [{"top_p": 0.7}, {"top_k": 6}, {"top_k": 12, "top_p": 0.6}, {"min_p": 0.3}, {}], ids=str
)
def test_distribution(params: dict[str, float]) -> None:
    """Of many rows with one distribution: the set is the reference's, and so are the frequencies."""
    count = 20_000
    logits = randn(1, 60, dtype=torch.float32, seed=3, scale=2.0)
    draws = make_draws([params])
    floor = reference._floor(logits, draws.top_k, draws.top_p, draws.min_p)
    expected = torch.softmax(logits[0].masked_fill(logits[0] < floor, -torch.inf), -1)
    got = fast.draw_rows(logits.repeat(count, 1), make_draws([params] * count, seed=11))
    found = torch.bincount(got, minlength=60) / count
    assert not found[expected == 0].any()
    assert ((found - expected).abs() < 5 * (expected / count).sqrt() + 1e-9).all()


def test_what_is_not_finite_yields_minus_one() -> None:
    logits = randn(6, VOCAB, dtype=torch.float32, seed=5)
    logits[0, 3] = torch.nan
    logits[1, VOCAB - 1] = torch.inf
    logits[2] = -torch.inf
    params = [
        {"top_p": 0.9},
        {"top_k": 3},
        {"top_k": 3, "top_p": 0.5},
        {"temperature": 0.0},
        {},
        {"min_p": 0.5},
    ]
    got = fast.draw_rows(logits, make_draws(params))
    assert got[:3].tolist() == [-1, -1, -1]
    assert (got[3:] >= 0).all()
    for order in ([3, 4, 5, 0, 1, 2], [5, 2, 3, 1, 0, 4]):
        again = fast.draw_rows(logits[order], make_draws([params[i] for i in order]))
        assert [int(t) < 0 for t in again] == [i < 3 for i in order]


def test_a_row_ignores_its_neighbours() -> None:
    """Bitwise, hence also with ties at the edge of top-p."""
    count = 200 if ON_GPU else 19
    logits = randn(count, VOCAB, dtype=torch.float32, seed=7, scale=0.5).round(decimals=1)
    params = [FILTERS[i % len(FILTERS)] for i in range(count)]
    draws = make_draws(params)
    together = fast.draw_rows(logits, draws)
    for i in range(5, count, 3 if ON_GPU else 6):
        alone = Draws(*(t[i : i + 1] for t in draws[:5]), *draws[5:])
        assert fast.draw_rows(logits[i : i + 1], alone) == together[i]


def test_edits() -> None:
    logits = randn(5, VOCAB, dtype=torch.float32, seed=9)
    generator = torch.Generator().manual_seed(2)
    biases, histories = [3, 0, 50], [0, 120, 70]

    def ids(counts: list[int]) -> torch.Tensor:
        return torch.cat([torch.randperm(VOCAB, generator=generator)[:n] for n in counts]).int().to(DEVICE)

    def starts(counts: list[int]) -> torch.Tensor:
        return torch.tensor([0, *counts]).cumsum(0).int().to(DEVICE)

    bias = torch.randn(53, generator=generator).to(DEVICE)
    bias[1] = bias[20] = -torch.inf
    edits = Edits(
        torch.tensor([4, 0, 3], dtype=torch.int32, device=DEVICE),
        starts(biases),
        ids(biases),
        bias,
        starts(histories),
        ids(histories),
        torch.randint(0, 4, (190,), generator=generator).int().to(DEVICE),
        torch.tensor([[1.0, 1.3, 0.8], [0.0, 0.7, -0.5], [0.0, 0.2, 0.1]], device=DEVICE),
    )
    expected = logits.clone()
    reference.edit_rows(expected, edits)
    assert (expected[[1, 2]] == logits[[1, 2]]).all()
    fast.edit_rows(logits, edits)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)


def test_masks() -> None:
    logits = randn(4, VOCAB, dtype=torch.float32, seed=10)
    generator = torch.Generator().manual_seed(3)
    words = -(-VOCAB // 32)
    bits = torch.randint(-(2**31), 2**31, (2, words), generator=generator).int().to(DEVICE)
    rows = torch.tensor([3, 1], dtype=torch.int32, device=DEVICE)
    expected = logits.clone()
    reference.forbid_rows(expected, rows, bits)
    fast.forbid_rows(logits, rows, bits)
    assert torch.equal(logits, expected)
    assert 0.3 < float(torch.isinf(logits[3]).float().mean()) < 0.7


@pytest.mark.parametrize("k", [0, 1, 5])
def test_scores(k: int) -> None:
    logits = (randn(4, VOCAB, dtype=torch.float32, seed=12) * 4).round() / 2  # many ties
    logits[2, 5:] = -torch.inf
    tokens = torch.tensor([3, VOCAB - 1, 0, -1], device=DEVICE)
    got = fast.score_rows(logits, tokens, k)
    logprobs = torch.log_softmax(logits.double(), -1)
    torch.testing.assert_close(got.own[:3].double(), logprobs[[0, 1, 2], tokens[:3]], rtol=1e-5, atol=1e-5)
    assert got.ranks[:3].tolist() == [int((logits[i] > logits[i, tokens[i]]).sum()) + 1 for i in range(3)]
    _, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    assert torch.equal(got.ids, ids[:, :k])
    torch.testing.assert_close(got.values.double(), logprobs.gather(1, ids[:, :k]), rtol=1e-5, atol=1e-5)
    assert torch.equal(fast.score_rows(logits[1:2].contiguous(), tokens[1:2], k).own, got.own[1:2])
