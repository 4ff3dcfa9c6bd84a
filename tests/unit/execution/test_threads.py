"""The thread governor against a machine made of numbers."""

from __future__ import annotations

import pytest

from headrace.execution.threads import ThreadGovernor


class Machine:
    """Cores that others and we keep busy; time passes in ``run``."""

    def __init__(self, cores: int) -> None:
        self.cores, self.now, self.own, self.total, self.idle = cores, 0.0, 0.0, 0.0, 0.0
        self.applied: list[int] = []
        self.governor = ThreadGovernor(
            cores,
            cores=cores,
            read=lambda: (self.total, self.idle),
            clock=lambda: self.now,
            own=lambda: self.own,
            apply=self.applied.append,
        )

    def run(self, seconds: float, others: float) -> int:
        """Steps of 10 ms, in which our threads take what the others leave them, fairly."""
        for _ in range(round(seconds / 0.01)):
            ours = self.governor.threads
            wanted = ours + others
            share = min(1.0, self.cores / wanted)
            self.now += 0.01
            self.own += 0.01 * ours * share
            self.total += self.cores
            self.idle += max(self.cores - wanted, 0.0)
            self.governor.adjust()
        return self.governor.threads


@pytest.mark.parametrize("cores", [2, 4, 16])
def test_gives_way_to_busy_processes_and_comes_back(cores: int) -> None:
    machine = Machine(cores)
    assert machine.run(2, others=0.0) == cores
    assert machine.run(2, others=1.0) == cores - 1
    assert machine.run(2, others=0.0) == cores
    assert machine.run(2, others=cores) <= max(1, cores // 8)
    assert machine.run(2, others=0.2) == cores
    # Nothing flutters while the load stays.
    assert len(machine.applied) <= 4 + cores


def test_small_disturbances_change_nothing() -> None:
    machine = Machine(2)
    machine.run(3, others=0.15)  # a front end that streams tokens
    assert machine.applied == []


def test_one_core_and_unknown_machines_are_left_alone() -> None:
    assert Machine(1).run(1, others=3.0) == 1
    governor = ThreadGovernor(4, cores=4, read=lambda: None, apply=lambda _: pytest.fail("applied"))
    assert [governor.adjust() for _ in range(3)] == [4, 4, 4]


def test_load_from_before_a_pause_is_forgotten() -> None:
    machine = Machine(2)
    machine.run(0.5, others=0.0)
    machine.now += 60.0
    machine.total += 12000.0  # busy with others while we slept
    machine.governor.adjust()
    assert machine.governor.threads == 2
