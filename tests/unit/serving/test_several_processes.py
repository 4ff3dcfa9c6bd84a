"""What HTTP processes of one server share: places, counts, and a core that forgets the dead."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import msgspec
import pytest

from headrace.engines.loop import HEARTBEAT_SECONDS, CoreLoop
from headrace.messages import Abort, CoreStats, Forget, FromCore, Heartbeat, Shutdown, Submit, ToCore
from headrace.serving.metrics import Counts, ModelMetrics
from headrace.serving.places import Places, SharedPlaces, refused
from headrace.types import EncodeOutput, EncodeParams, Request


def take_and_give(path: Path, row: int, rounds: int, limit: int, most: object) -> None:
    places = SharedPlaces(path, ["a", "b"], row)
    for _ in range(rounds):
        held = places.take("b", 2, limit)
        if not refused(held, 2, limit):
            with most.get_lock():  # type: ignore[attr-defined]
                most.value = max(most.value, held + 2)  # type: ignore[attr-defined]
            places.give_back("b", 2)


def test_shared_places_never_go_over_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "places"
    SharedPlaces.create(path, 2, 4)
    context = multiprocessing.get_context("fork")
    most = context.Value("q", 0)
    crowd = [context.Process(target=take_and_give, args=(path, row, 1500, 5, most)) for row in range(1, 4)]
    for process in crowd:
        process.start()
    for process in crowd:
        process.join(120)
        assert process.exitcode == 0
    assert 2 <= most.value <= 5
    assert SharedPlaces(path, ["a", "b"], 0).take("b", 1, 5) == 0  # all given back


def test_places_of_a_dead_process_are_free_again(tmp_path: Path) -> None:
    path = tmp_path / "places"
    SharedPlaces.create(path, 2, 2)
    first, other = (SharedPlaces(path, ["a", "b"], row) for row in range(2))
    assert [first.take("a", 2, 9), other.take("a", 3, 9), other.take("b", 1, 9)] == [0, 2, 0]
    first.clear(1)
    assert first.take("a", 1, 9) == 2
    assert first.take("b", 1, 9) == 0


@pytest.mark.parametrize("shared", [False, True])
def test_a_crowd_larger_than_the_queue_gets_in_when_it_is_alone(shared: bool, tmp_path: Path) -> None:
    SharedPlaces.create(tmp_path / "places", 1, 1)
    places = SharedPlaces(tmp_path / "places", ["m"], 0) if shared else Places()
    assert places.take("m", 100, 8) == 0
    assert places.take("m", 1, 8) == 100  # refused: nothing was added
    places.give_back("m", 100)
    assert places.take("m", 1, 8) == 0
    assert places.take("m", 8, 8) == 1
    assert places.take("m", 7, 8) == 1


def counted(answers: int, in_flight: int) -> Counts:
    counts = Counts({"m": ModelMetrics(in_flight=in_flight)}, {("/embed", 200): answers})
    for _ in range(answers):
        counts.models["m"].request_seconds.observe(0.2)
        counts.models["m"].input_tokens += 7
        counts.models["m"].outcomes["stop"] = counts.models["m"].outcomes.get("stop", 0) + 1
    return counts


def test_counts_of_processes_are_added_and_travel() -> None:
    total = counted(2, 1)
    other = msgspec.msgpack.decode(msgspec.msgpack.encode(counted(3, 4)), type=Counts)
    other.models["n"] = ModelMetrics(rejected=5)
    total.add(other)
    m = total.models["m"]
    assert (m.input_tokens, m.in_flight, m.outcomes, total.models["n"].rejected) == (35, 5, {"stop": 5}, 5)
    assert m.request_seconds.buckets()[-1] == ("+Inf", 5.0)
    assert m.request_seconds.sum == pytest.approx(1.0)
    assert total.responses == {("/embed", 200): 5}
    assert other == msgspec.msgpack.decode(msgspec.msgpack.encode(other), type=Counts)
    other.ended()
    assert other.models["m"].in_flight == 0
    assert other.models["m"].input_tokens == 21


class SlowCore:
    """Answers one request a step, in order."""

    def __init__(self) -> None:
        self.waiting: list[str] = []
        self.aborted: list[str] = []

    def add(self, requests: object) -> None:
        self.waiting += [request.id for request in requests]  # type: ignore[attr-defined]

    def abort(self, request_ids: object) -> None:
        self.aborted += request_ids  # type: ignore[operator]
        self.waiting = [name for name in self.waiting if name not in request_ids]  # type: ignore[operator]

    def has_work(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list[EncodeOutput]:
        return [EncodeOutput(self.waiting.pop(0))]

    def idle(self) -> None: ...

    def stats(self) -> CoreStats:
        return CoreStats()

    def close(self) -> None: ...


class ScriptedTransport:
    """Gives out one list of messages a turn."""

    def __init__(self, turns: list[list[tuple[bytes, ToCore]]]) -> None:
        self.turns = turns
        self.sent: list[tuple[bytes, str]] = []
        self.beats: list[set[bytes]] = []
        self.clients: set[bytes] = set()

    def receive(self, timeout: float) -> list[tuple[bytes, ToCore]]:
        turn = self.turns.pop(0)
        self.clients |= {client for client, _ in turn}
        return turn

    def send(self, client: bytes, message: FromCore) -> None:
        self.sent += [(client, output.request_id) for output in message.outputs]  # type: ignore[union-attr]

    def broadcast(self, message: FromCore) -> None:
        assert isinstance(message, Heartbeat)
        self.beats.append(set(self.clients))

    def forget(self, client: bytes) -> None:
        self.clients.discard(client)


def asks(*names: str) -> Submit:
    return Submit(tuple(Request(id=name, token_ids=(1,), encode=EncodeParams()) for name in names))


def test_a_core_drops_what_a_dead_process_asked_and_nothing_else() -> None:
    core = SlowCore()
    transport = ScriptedTransport(
        [
            [(b"x", asks("x1", "x2")), (b"y", asks("y1", "y2"))],
            [(b"x", Forget(b"y"))],
            [(b"y", asks("y3")), (b"x", asks("x3"))],  # read late: it was sent before the death
            [],
            [(b"x", Abort(("none",))), (b"x", Shutdown())],
            [],
        ]
    )
    CoreLoop(core, transport).run()
    assert transport.sent == [(b"x", "x1"), (b"x", "x2"), (b"x", "x3")]
    assert core.aborted == ["y1", "y2", "none"]


def test_every_process_hears_the_heart_whoever_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += HEARTBEAT_SECONDS / 4
        return now

    monkeypatch.setattr("headrace.engines.loop.time.monotonic", clock)
    turns: list[list[tuple[bytes, ToCore]]] = [[(b"quiet", asks())]]
    turns += [[(b"busy", asks(str(i)))] for i in range(40)]
    transport = ScriptedTransport([*turns, [(b"busy", Shutdown())]])
    CoreLoop(SlowCore(), transport).run()
    assert len(transport.sent) == 40
    assert sum(b"quiet" in clients for clients in transport.beats) >= 8
