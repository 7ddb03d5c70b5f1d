"""What workers tell: which of them hang, and figures for Prometheus, which tests/cluster/test_joined.py scrapes."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch

from densenet_dist.cluster.coordinator import Coordinator, explain_crash
from densenet_dist.cluster.heartbeat import Heartbeat, is_hung
from densenet_dist.cluster.telemetry import GAUGES, Telemetry
from densenet_dist.train.context import StopRequest

WORKER = Heartbeat(rank=0, world_size=2, host="far", step=40, saved=0, progress=40, phase="train",
                   idle_s=0.1, longest_idle_s=0.5, where="", waits_for_ranks=True)  # fmt: skip


def hung(*workers: Heartbeat) -> list[int]:
    return [worker.rank for worker in workers if is_hung(worker, workers, timeout_s=10)]


def test_the_idle_worker_that_is_furthest_behind_hangs():
    """It hangs in the input pipeline; the others wait for it in the exchange of gradients, one step ahead."""
    waits = replace(WORKER, idle_s=11.0, progress=41, step=41)
    hangs = replace(WORKER, rank=1, idle_s=11.5, phase="wait", where="loader.py:90", waits_for_ranks=False)
    assert hung(waits, hangs) == [1]
    assert hung(waits, replace(hangs, waits_for_ranks=True)) == [1]
    assert hung(waits) == [], "after a restart of the coordinator, which does not know the other one yet"


def test_in_an_evaluation_the_one_that_does_not_wait_for_others_hangs():
    """Ranks have shares of their own there, so that the number of batches says nothing."""
    waits = replace(WORKER, idle_s=11.0, phase="test", progress=38)
    assert hung(waits, replace(WORKER, rank=1, idle_s=11.5, phase="test", progress=45, waits_for_ranks=False)) == [1]


def test_those_that_wait_for_a_rank_that_saves_do_not_hang():
    saves = replace(WORKER, idle_s=70.0, phase="save", waits_for_ranks=False)
    assert hung(saves, replace(WORKER, rank=1, idle_s=69.0)) == []


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
def test_the_limit_depends_on_the_phase(changes, found):
    assert bool(hung(replace(WORKER, world_size=1, **changes))) is found


def test_a_hung_worker_is_reported_and_told_to_exit():
    async def beats() -> None:
        coordinator = Coordinator(hang_timeout_s=10)
        idle = replace(WORKER, idle_s=11.0)
        for rank in range(2, 4):  # of an earlier, larger world
            await coordinator.heartbeat(replace(WORKER, rank=rank, world_size=4))
        assert await coordinator.heartbeat(idle) is StopRequest.NONE
        assert await coordinator.heartbeat(replace(idle, rank=1, progress=39, where="loop.py:9")) is None
        assert await coordinator.heartbeat(idle) is StopRequest.NONE
        [note] = await coordinator.drain()
        assert note["text"].startswith("rank 1 on far, after step 40, made no progress for 11 s (train at loop.py:9)")

    asyncio.run(beats())


def test_the_page_explains_each_figure():
    page = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text()
    assert re.findall(r"^\| `ray_(\w+)` \|", page, re.MULTILINE) == list(GAUGES)


def test_no_run_fails_for_its_figures(caplog: pytest.LogCaptureFixture):
    telemetry = Telemetry("run")
    for _ in range(2):
        telemetry({"kind": "progress"})
    (record,) = caplog.records
    assert "no longer exported" in record.message


def test_the_memory_that_ran_out_is_named():
    assert "the node had none left" in explain_crash(ray.exceptions.OutOfMemoryError("killed"), "the worker")
    assert explain_crash(torch.OutOfMemoryError("CUDA out of memory."), "the worker") == "CUDA out of memory."
