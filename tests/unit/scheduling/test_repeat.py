"""Several runs of one decode step: when the scheduler allows them, and how their tokens are settled."""

from __future__ import annotations

import pytest

from headrace.kvcache.blocks import BlockPool
from headrace.scheduling.plan import StepPlan
from headrace.scheduling.scheduler import Scheduler
from headrace.types import FinishReason, Request, SamplingParams

BLOCK = 4


def make(num_blocks: int = 40, max_num_seqs: int = 4) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks),
        block_size=BLOCK,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=64,
        max_model_len=64,
        eos_ids=(2,),
    )


def add(scheduler: Scheduler, name: str, prompt: int, output: int) -> None:
    tokens = tuple(range(10, 10 + prompt))
    scheduler.add(Request(id=name, token_ids=tokens, sampling=SamplingParams(max_tokens=output)))


def decoding(scheduler: Scheduler) -> StepPlan:
    """Past the prompts: the next step gives everybody one token."""
    first = scheduler.schedule()
    assert first is not None
    scheduler.settle(first, [5] * len(first.sampling))
    plan = scheduler.schedule()
    assert plan is not None
    return plan


def test_tokens_of_all_runs() -> None:
    scheduler = make()
    add(scheduler, "a", 3, 20)
    add(scheduler, "b", 6, 20)
    plan = decoding(scheduler)
    scheduler.repeat(plan, 4)
    assert plan.repeats == 4
    a, b = (chunk.sequence for chunk in plan.chunks)
    assert (a.length, b.length) == (3 + 1 + 4, 6 + 1 + 4)
    assert len(a.table.blocks) * BLOCK >= a.num_computed == 7
    ahead = scheduler.schedule()  # the loop is one step ahead
    assert ahead is not None and [chunk.start for chunk in ahead.chunks] == [7, 10]
    advanced = scheduler.settle(plan, [20, 30, 21, 31, 22, 32, 23, 33])
    assert advanced == [a, b]
    assert a.token_ids[4:] == [20, 21, 22, 23] and b.token_ids[7:] == [30, 31, 32, 33]
    scheduler.settle(ahead, [24, 34])
    assert a.in_flight == b.in_flight == 0
    scheduler.check()


def test_a_sequence_ends_within_the_runs() -> None:
    """At its stop token or where a row broke; what the device made after that is dropped."""
    scheduler = make()
    for name in "abc":
        add(scheduler, name, 3, 20)
    plan = decoding(scheduler)
    scheduler.repeat(plan, 3)
    a, b, c = (chunk.sequence for chunk in plan.chunks)
    scheduler.settle(plan, [20, 30, 40, 2, 31, -1, 21, 32, 41])
    assert a.token_ids[4:] == [20, 2] and a.finish_reason is FinishReason.STOP
    assert b.token_ids[4:] == [30, 31, 32] and b.finish_reason is None
    assert c.token_ids[4:] == [40] and c.finish_reason is FinishReason.ERROR
    assert list(scheduler.sequences) == ["b"]
    scheduler.check()


def test_only_to_the_nearest_limit() -> None:
    scheduler = make()
    add(scheduler, "a", 3, 20)
    add(scheduler, "b", 3, 4)  # one token after the prompt, three more
    plan = decoding(scheduler)
    scheduler.repeat(plan, 8)
    assert plan.repeats == 3
    scheduler.settle(plan, [20, 30] * 3)
    assert list(scheduler.sequences) == ["a"]


@pytest.mark.parametrize("why", ["somebody waits", "no blocks", "a prompt", "admitted", "one is full"])
def test_once_while_somebody_could_notice(why: str) -> None:
    scheduler = make(num_blocks=4 if why == "no blocks" else 40, max_num_seqs=2)
    add(scheduler, "a", 3, 20)
    if why == "admitted":
        plan = scheduler.schedule()
        assert plan is not None
        plan.chunks[0].start, plan.chunks[0].count, plan.num_tokens = 2, 1, 1
    elif why == "one is full":
        add(scheduler, "b", 3, 2)
        first = decoding(scheduler)  # b's last token is on its way
        assert len(first.chunks) == 2
        later = scheduler.schedule()
        assert later is not None and len(later.chunks) == 1
        plan = later
    else:
        add(scheduler, "b", 3, 20)
        plan = decoding(scheduler)
        if why == "somebody waits":
            add(scheduler, "c", 3, 20)
        if why == "a prompt":
            plan.chunks[1].count, plan.num_tokens = 2, 3
    if why == "no blocks":
        taken = scheduler.pool.num_available
        while scheduler.pool.num_available:
            scheduler.pool.allocate(None)
        assert taken < 2
    before = [(c.sequence.num_computed, c.sequence.in_flight) for c in plan.chunks]
    scheduler.repeat(plan, 4)
    assert plan.repeats == 1
    assert [(c.sequence.num_computed, c.sequence.in_flight) for c in plan.chunks] == before
