"""The order of a step's chunks: kernels are chosen by the first one (execution/graph_keys.py)."""

from __future__ import annotations

import random

import pytest

from headrace.execution.graph_keys import GraphLadders
from headrace.kvcache.blocks import BlockPool
from headrace.scheduling.scheduler import Scheduler
from headrace.types import Request, SamplingParams


def make(num_blocks: int = 60, budget: int = 40) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks),
        block_size=4,
        max_num_seqs=8,
        max_num_batched_tokens=budget,
        max_model_len=64,
        eos_ids=(2,),
    )


def add(scheduler: Scheduler, name: str, tokens: range) -> None:
    scheduler.add(Request(id=name, token_ids=tuple(tokens), sampling=SamplingParams(max_tokens=20)))


def test_lone_tokens_come_first_where_others_wait_for_their_masks() -> None:
    """Two sequences decode and are not ready; two come: a prompt, and one of which all but a token is cached."""
    scheduler = make()
    for name, first in (("a", 100), ("b", 200), ("cached", 300)):
        add(scheduler, name, range(first, first + 5))
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.settle(plan, [2 if chunk.sequence.id == "cached" else 5 for chunk in plan.sampling])
    scheduler.is_ready = lambda sequence: sequence.id not in ("a", "b")
    add(scheduler, "prompt", range(400, 409))
    add(scheduler, "again", range(300, 305))
    plan = scheduler.schedule()
    assert plan is not None
    assert [(chunk.sequence.id, chunk.count) for chunk in plan.chunks] == [("again", 1), ("prompt", 9)]
    assert GraphLadders(8, 64, None, fixed=False).mixed(plan).some_single


@pytest.mark.parametrize("seed", range(3))
def test_lone_tokens_come_first(seed: int) -> None:
    """Random traffic with prompts that share their beginnings, masks that are late, and few blocks."""
    rng = random.Random(seed)
    scheduler = make(num_blocks=rng.choice((24, 60)), budget=rng.choice((9, 40)))
    mixed = 0
    for step in range(400):
        if rng.random() < 0.4:
            first = rng.choice((100, 200, 300))
            add(scheduler, str(step), range(first, first + rng.randrange(1, 24)))
        late = {sequence.id for sequence in scheduler.running if rng.random() < 0.8}
        scheduler.is_ready = lambda sequence, late=late: sequence.id not in late  # type: ignore[misc]
        plan = scheduler.schedule()
        if plan is None:
            continue
        counts = [chunk.count for chunk in plan.chunks]
        lone = counts.count(1)
        assert all(count == 1 for count in counts[:lone]), counts
        assert plan.num_tokens == sum(counts)
        mixed += 0 < lone < len(counts)
        scheduler.settle(plan, [rng.choice((5, 6, 7, 2)) for _ in plan.sampling])
    scheduler.check()
    assert mixed > 10
