"""Which workers hang, by their beats."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import psutil
import pytest

from densenet_dist.cluster.heartbeat import Heartbeat
from densenet_dist.cluster.watchdog import Heartbeats, kill_process

WORKER = {"node": "n", "host": "far", "pid": 1, "started": 0.0}
BEAT = Heartbeat(**WORKER, rank=0, world_size=2, step=40, saved=0, progress=40, phase="train",
                 idle_s=0.1, longest_idle_s=0.5, where="", waits_for_ranks=True)  # fmt: skip


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def look(beats: Heartbeats, clock: Clock, seconds: float, *sent: Heartbeat) -> list[str]:
    """What is found while those beats come once a second."""
    found: list[str] = []
    for _ in range(int(seconds)):
        clock.now += 1
        for beat in sent:
            beats.record(beat)
        found += map(str, beats.hung(10))
    return found


def test_a_silent_worker_is_found_in_time_and_told_once(clock):
    beats = Heartbeats(clock)
    assert look(beats, clock, 100, BEAT, replace(BEAT, rank=1)) == []
    assert look(beats, clock, 9, BEAT) == []
    assert look(beats, clock, 3, BEAT) == ["rank 1 on far has not been heard of for 11 s after step 40"]
    assert look(beats, clock, 30, BEAT) == []


def test_of_those_that_stand_still_the_one_that_is_furthest_behind_is_named(clock):
    """It stands in the input pipeline; the others wait for it in the exchange of gradients, one step ahead."""
    waits = replace(BEAT, idle_s=11.0, progress=41, step=41)
    hangs = replace(BEAT, rank=1, idle_s=11.5, phase="wait", where="loader.py:90", waits_for_ranks=False)
    assert look(Heartbeats(clock), clock, 2, waits, hangs) == [
        "rank 1 on far stands still (wait at loader.py:90) for 12 s after step 40"
    ]


def test_in_an_evaluation_the_one_that_does_not_wait_for_others_is_named(clock):
    """Ranks have shares of their own there, so that the number of batches says nothing."""
    waits = replace(BEAT, idle_s=11.0, phase="test", progress=38)
    hangs = replace(BEAT, rank=1, idle_s=11.5, phase="test", progress=45, waits_for_ranks=False)
    (found,) = look(Heartbeats(clock), clock, 2, waits, hangs)
    assert found.startswith("rank 1 on far stands still (test)")


def test_those_that_wait_for_a_rank_that_saves_do_not_hang(clock):
    saves = replace(BEAT, idle_s=70.0, phase="save", waits_for_ranks=False)
    assert look(Heartbeats(clock), clock, 2, saves, replace(BEAT, rank=1, idle_s=69.0)) == []


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"idle_s": 11.0}, True),
        ({"idle_s": 19.0, "longest_idle_s": 2.0}, False),
        ({"idle_s": 21.0, "longest_idle_s": 2.0}, True),
        ({"idle_s": 599.0, "longest_idle_s": None}, False),
        ({"idle_s": 9999.0, "phase": "start"}, False),
        ({"idle_s": 11.0, "phase": "validate"}, True),
    ],
)
def test_how_long_is_long_depends_on_what_it_does(clock, changes, found):
    assert bool(look(Heartbeats(clock), clock, 2, replace(BEAT, **changes))) is found


def test_ranks_of_a_larger_world_before_are_forgotten(clock):
    beats = Heartbeats(clock)
    look(beats, clock, 2, *(replace(BEAT, rank=rank, world_size=4) for rank in range(4)))
    assert look(beats, clock, 30, BEAT, replace(BEAT, rank=1)) == []


def test_it_accuses_nobody_after_it_stood_still_itself(clock):
    beats = Heartbeats(clock)
    look(beats, clock, 3, BEAT)
    clock.now += 1000
    assert beats.hung(10) == []
    assert look(beats, clock, 9) == []
    assert len(look(beats, clock, 3)) == 1


def test_only_the_process_that_was_meant_is_killed():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    born = psutil.Process(process.pid).create_time()
    assert not kill_process(process.pid, born - 100)
    assert process.poll() is None
    assert kill_process(process.pid, born)
    assert process.wait(60) == -9
    assert not kill_process(process.pid, born)
