from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.scheduling.token_budget import TokenBudgetQueue, Waiting


def drain(queue: TokenBudgetQueue, now: float = 0.0) -> list[list[str]]:
    batches = []
    while len(queue):
        ids, _ = queue.next_batch(now)
        batches.append(ids)
    return batches


def test_first_come_first_served_within_the_budget() -> None:
    queue = TokenBudgetQueue(max_tokens=10, max_seqs=3)
    for id, n in (("a", 4), ("b", 6), ("c", 1), ("d", 30), ("e", 2), ("f", 1), ("g", 1), ("h", 1)):
        queue.add(Waiting(id, n))
    assert queue.num_tokens == 46
    assert drain(queue) == [["a", "b"], ["c"], ["d"], ["f", "g", "e"], ["h"]]
    assert queue.num_tokens == 0


def test_priority_then_arrival() -> None:
    queue = TokenBudgetQueue(max_tokens=1, max_seqs=1)
    for id, priority in (("a", 1), ("b", 0), ("c", 1), ("d", -3), ("e", 0)):
        queue.add(Waiting(id, 1, priority))
    assert [ids[0] for ids in drain(queue)] == ["d", "b", "e", "a", "c"]


def test_removed_ones_cost_nothing_and_may_come_back() -> None:
    queue = TokenBudgetQueue(max_tokens=100, max_seqs=100)
    for i in range(5):
        queue.add(Waiting(str(i), 3))
    assert queue.remove(["1", "3", "nobody"]) == 2
    queue.add(Waiting("1", 7))
    assert (len(queue), queue.num_tokens) == (4, 16)
    ids, expired = queue.next_batch(0.0)
    assert (ids, expired) == (["0", "2", "4", "1"], [])


def test_deadlines() -> None:
    queue = TokenBudgetQueue(max_tokens=4, max_seqs=10)
    queue.add(Waiting("late", 400, deadline=5.0))
    queue.add(Waiting("fine", 2, deadline=5.1))
    queue.add(Waiting("never", 2))
    assert queue.next_batch(5.0) == (["fine", "never"], ["late"])


ops = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 40), st.integers(-1, 1)),
    st.tuples(st.just("remove"), st.integers(0, 60), st.just(0)),
    st.tuples(st.just("batch"), st.just(0), st.just(0)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(ops, max_size=60), st.integers(1, 50), st.integers(1, 6))
def test_everyone_runs_exactly_once_in_order(
    trace: list[tuple[str, int, int]], budget: int, seqs: int
) -> None:
    queue = TokenBudgetQueue(budget, seqs)
    waiting: dict[str, tuple[int, int, int]] = {}  # id -> (priority, arrival, tokens)
    for step, (op, value, priority) in enumerate(trace + [("batch", 0, 0)] * 80):
        if op == "add":
            queue.add(Waiting(str(step), value, priority))
            waiting[str(step)] = (priority, step, value)
        elif op == "remove":
            assert queue.remove([str(value)]) == int(str(value) in waiting)
            waiting.pop(str(value), None)
        else:
            ids, expired = queue.next_batch(0.0)
            assert not expired
            assert bool(ids) == bool(waiting)
            expected = sorted(waiting, key=lambda id: waiting[id][:2])[: len(ids)]
            assert sorted(ids) == sorted(expected)  # nobody was overtaken
            lengths = [waiting.pop(id)[2] for id in ids]
            assert lengths == sorted(lengths)
            assert len(ids) <= seqs
            assert sum(lengths) <= budget or len(ids) == 1
        assert len(queue) == len(waiting)
        assert queue.num_tokens == sum(entry[2] for entry in waiting.values())
    assert not waiting
