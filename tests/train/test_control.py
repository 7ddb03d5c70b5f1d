"""What a rank tells of itself, and where a run's time goes."""

from __future__ import annotations

import pytest

from densenet_dist.train import context as module
from densenet_dist.train.context import Goodput, WorkerStatus


class Clock:
    """Both clocks that the module reads, set by a test."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def time(self) -> float:
        return 1_000_000 + self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def spend(status: WorkerStatus, clock: Clock, phase: str, seconds: float) -> None:
    status.enter(phase)  # type: ignore[arg-type]
    clock.now += seconds


def test_it_remembers_the_longest_pause_between_two_steps_but_the_first(clock):
    status = WorkerStatus()
    for step, seconds in enumerate((100.0, 3.0, 7.0, 1.0), start=1):  # the first one compiles
        clock.now += seconds
        status.advance(step)
    assert (status.step, status.progress, status.longest_idle_s) == (4, 4, 7.0)
    clock.now += 2.5
    assert status.idle_s == 2.5


def test_shares_of_goodput_add_up_to_all_time(clock):
    status = WorkerStatus()
    goodput = Goodput(status)
    for phase, seconds in (("start", 4.0), ("wait", 1.0), ("train", 10.0), ("validate", 3.0)):
        spend(status, clock, phase, seconds)
    with status.during("save"):
        clock.now += 2
    assert status.phase == "validate"
    metrics = goodput.metrics()
    assert metrics["goodput/ratio"] == 0.5
    assert (metrics["goodput/lost_to_start"], metrics["goodput/lost_to_save"]) == (0.2, 0.1)
    assert sum(metrics.values()) == pytest.approx(1.0)


def test_work_lost_with_a_process_and_the_time_until_it_is_replaced_are_recovery(clock):
    first = WorkerStatus()
    goodput = Goodput(first, "launch", workers=2)
    clock.now += 5
    spend(first, clock, "train", 10)
    state = goodput.state_dict()  # at 15 s
    assert goodput.device_hours * 3600 == pytest.approx(30)
    spend(first, clock, "train", 7)  # lost, at 22 s
    clock.now += 3
    second = WorkerStatus()  # begins at 25 s
    again = Goodput(second, "launch", workers=1)
    clock.now += 4
    again.load_state_dict(state)  # at 29 s
    spend(second, clock, "train", 11)  # until 40 s
    spent = again.seconds()
    assert spent["recovery"] == 14.0
    assert (spent["start"], spent["train"]) == (5.0, 21.0)
    assert sum(spent.values()) == 40.0
    assert again.device_hours * 3600 == pytest.approx(30 + 25)


def test_the_time_between_a_stop_and_a_resume_counts_for_nothing(clock):
    first = WorkerStatus()
    goodput = Goodput(first, "one")
    spend(first, clock, "train", 10)
    state = goodput.state_dict()
    clock.now += 3600
    second = WorkerStatus()
    again = Goodput(second, "two")
    clock.now += 1
    again.load_state_dict(state)
    spend(second, clock, "train", 10)
    spent = again.seconds()
    assert (spent["recovery"], spent["start"], spent["train"]) == (0.0, 1.0, 20.0)
