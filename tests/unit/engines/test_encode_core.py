from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest

from headrace.engines.encode import EncodeCore
from headrace.engines.loop import Core
from headrace.errors import InvalidRequest
from headrace.types import EncodeOutput, EncodeParams, EncodeTask, Request, SamplingParams


class FakePass:
    """Answers with the lengths; breaks on token 13, and knows a hundred tokens."""

    tasks = frozenset({EncodeTask.EMBED, EncodeTask.EMBED_ALL})
    max_tokens = 50
    dimensions = 8
    token_types = 2

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def run(self, requests: Sequence[Request]) -> list[EncodeOutput]:
        self.batches.append([request.id for request in requests])
        if any(13 in request.token_ids for request in requests):
            raise RuntimeError("thirteen")
        if not all(0 <= token < 100 for request in requests for token in request.token_ids):
            raise InvalidRequest("a token id is outside the vocabulary", param="input")
        return [EncodeOutput(r.id, b"", (len(r.token_ids),)) for r in requests]


def request(id: str, ids: Sequence[int] = (1, 2), **fields: object) -> Request:
    return Request(id=id, token_ids=tuple(ids), **{"encode": EncodeParams(), **fields})  # type: ignore[arg-type]


def core(max_tokens: int = 20, max_seqs: int = 8) -> EncodeCore:
    return EncodeCore(FakePass(), max_tokens=max_tokens, max_seqs=max_seqs)


def run_all(engine: Core) -> dict[str, EncodeOutput]:
    found: dict[str, EncodeOutput] = {}
    while engine.has_work():
        for output in engine.step():
            assert isinstance(output, EncodeOutput)
            assert output.request_id not in found
            found[output.request_id] = output
    engine.idle()
    return found


def test_everybody_is_answered_once_and_batches_keep_the_budget() -> None:
    engine = core()
    engine.add([request(str(i), [1] * (i % 9 + 1)) for i in range(40)])
    found = run_all(engine)
    assert {id: output.shape for id, output in found.items()} == {str(i): (i % 9 + 1,) for i in range(40)}
    batches = engine.runner.batches  # type: ignore[attr-defined]
    assert all(sum(int(id) % 9 + 1 for id in batch) <= 20 and len(batch) <= 8 for batch in batches)
    stats = engine.stats()
    assert (stats.steps, stats.num_waiting) == (len(batches), 0)
    assert stats.prompt_tokens == sum(i % 9 + 1 for i in range(40))


def test_cancelled_requests_never_run() -> None:
    engine = core()
    engine.add([request(str(i)) for i in range(6)])
    engine.abort(["1", "4", "unknown"])
    assert sorted(run_all(engine)) == ["0", "2", "3", "5"]
    assert all("1" not in batch for batch in engine.runner.batches)  # type: ignore[attr-defined]
    assert engine.stats().aborted_tokens == 4


def test_a_request_that_breaks_the_pass_hurts_no_other() -> None:
    engine = core()
    engine.add([request("a"), request("bad", [1, 13]), request("c")])
    found = run_all(engine)
    assert "thirteen" in found["bad"].error
    assert not found["a"].error
    assert not found["c"].error


def test_deadlines() -> None:
    engine = core()
    engine.add(
        [request("late", deadline=time.monotonic() - 1), request("fine", deadline=time.monotonic() + 60)]
    )
    found = run_all(engine)
    assert "deadline" in found["late"].error
    assert not found["fine"].error


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (request("x", ids=[]), "0 tokens"),
        (request("x", ids=[1] * 51), "51 tokens"),
        (request("x", ids=[100]), "vocabulary"),
        (request("x", ids=[-1]), "vocabulary"),
        (request("x", encode=None, sampling=SamplingParams()), "does not generate"),
        (request("x", encode=EncodeParams(task=EncodeTask.CLASSIFY)), "cannot classify"),
        (request("x", encode=EncodeParams(also=(EncodeTask.SPARSE,))), "cannot sparse"),
        (request("x", encode=EncodeParams(dimensions=9)), "dimensions is 9"),
        (request("x", encode=EncodeParams(dimensions=0)), "dimensions is 0"),
        (request("x", token_types=(0,)), "token_types"),
        (request("x", token_types=(0, 2)), "token_types holds 2"),
    ],
)
def test_what_can_never_run_is_answered_with_the_reason(bad: Request, word: str) -> None:
    engine = core()
    engine.add([request("good"), bad])
    found = run_all(engine)
    assert word in found["x"].error
    assert not found["good"].error


def test_an_id_that_waits_already_is_refused_and_the_first_one_lives() -> None:
    engine = core()
    engine.add([request("x", [1]), request("x", [1, 2])])
    outputs = [output for _ in range(2) for output in engine.step()]
    assert [bool(output.error) for output in outputs] == [True, False]
    assert outputs[1].shape == (1,)


class FakeLaunch:
    """Done when asked the third time."""

    def __init__(self, work: Callable[[], list[EncodeOutput]]) -> None:
        self.work, self.asked = work, 0

    def done(self) -> bool:
        self.asked += 1
        return self.asked > 2

    def finish(self) -> list[EncodeOutput]:
        return self.work()


class FakeOverlap(FakePass):
    """Breaks at launch on token 14, at the end on token 13; counts what is under way."""

    def __init__(self) -> None:
        super().__init__()
        self.under_way = self.most = 0

    def launch(self, requests: Sequence[Request]) -> FakeLaunch:
        if any(14 in request.token_ids for request in requests):
            raise RuntimeError("fourteen")
        self.under_way += 1
        self.most = max(self.most, self.under_way)

        def work() -> list[EncodeOutput]:
            self.under_way -= 1
            return self.run(requests)

        return FakeLaunch(work)

    def prepare_next(self) -> bool:
        return False


def test_overlap_answers_everybody_once() -> None:
    engine = EncodeCore(FakeOverlap(), max_tokens=20, max_seqs=8, overlap=True)
    engine.add([request(str(i), [1] * (i % 9 + 1)) for i in range(40)])
    engine.add([request("bad", [1, 13]), request("worse", [14])])
    found = run_all(engine)
    assert len(found) == 42
    assert "thirteen" in found["bad"].error
    assert found["worse"].shape == (1,)  # alone it runs without being launched
    assert all(found[str(i)].shape == (i % 9 + 1,) for i in range(40))
    assert engine.runner.most == 2


def test_overlap_forgets_what_was_cancelled_on_the_way() -> None:
    engine = EncodeCore(FakeOverlap(), max_tokens=20, max_seqs=8, overlap=True)
    engine.add([request("a"), request("b")])
    assert engine.step() == []
    engine.abort(["a"])
    engine.add([request("a", [1, 2, 3])])
    found = run_all(engine)
    assert found["a"].shape == (3,)
    assert found["b"].shape == (2,)
    engine.add([request("c")])
    engine.step()
    engine.abort(["c"])
    assert run_all(engine) == {}


@pytest.mark.parametrize(("count", "length"), [(8, 1), (3, 9)])
def test_a_second_batch_follows_only_when_it_is_full(count: int, length: int) -> None:
    """Full by sequences, or by tokens; a part-filled one grows until the device is free."""
    runner = FakeOverlap()
    engine = EncodeCore(runner, max_tokens=20, max_seqs=8, overlap=True)
    engine.add([request("first")])
    assert engine.step() == []
    assert engine._running is not None
    busy = engine._running.launched
    busy.asked = -(10**9)  # type: ignore[attr-defined]
    engine.add([request(str(i), [1] * length) for i in range(count - 1)])
    assert engine.step() == []
    assert engine._running.launched is busy
    engine.add([request("last", [1] * length)])
    assert [output.request_id for output in engine.step()] == ["first"]
    assert engine._running.launched is not busy
    assert len(run_all(engine)) == count
