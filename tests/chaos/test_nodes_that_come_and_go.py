"""Ray clusters that lose nodes and get new ones."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from chaos_lab import Lab, Started, largest_difference_of_losses

LONG = ("train.epochs=40", "data.limit=1300", "train.schedule.name=cosine", "model.drop_rate=0")
SYNC = ("train.sync_bn=true", "train.lr=0.001")
"""With a high learning rate training itself makes rounding differences grow."""


@contextmanager
def two_nodes() -> Iterator[Any]:
    """A head without room for workers, and one node with a CPU."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()


def begin(lab: Lab, cluster: Any, *settings: str, **options: Any) -> Started:
    return lab.begin(f"cluster.address={cluster.address}", "cluster.max_failures=9", *LONG, *settings, **options)


def workers_of(run: Started) -> int:
    """Workers of the newest start, from what was printed."""
    said = re.findall(r"global batch size \d+; (\d+) x|resumed after .*, on (\d+) x", run.text)
    return int(said[-1][0] or said[-1][1]) if said else 0


@pytest.mark.fault(
    "one of two nodes is lost (SIGKILL of its raylet and worker); later another one joins",
    "waits, then resumes from the last checkpoint on the new node; equal",
)
def test_node_lost(lab: Lab) -> None:
    attempts = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "4"}
    with two_nodes() as cluster:
        second = cluster.add_node(num_cpus=1)
        run = begin(lab, cluster, "cluster.workers=2", "cluster.timeout_s=20", environment=attempts)
        run.wait_for_step(12)
        for losses in (1, 2, 3):
            cluster.remove_node(second, allow_graceful=False)
            run.wait_for(f"all workers are restarted ({losses} of at most 9 times)")
            time.sleep(9)
            second = cluster.add_node(num_cpus=1)
            seconds = run.wait_for_step(run.saved + 3)
        run.end(0)
    run.finish_like(lab.undisturbed(*LONG, "cluster.workers=2"), "waiting up to 20 s for resources: 2 workers")
    lab.observe(f"resumed {seconds:.0f} s after the last new node joined; equal", 3)


@pytest.mark.fault(
    "the same with cluster.workers={min: 1, max: 2}",
    "continues with one worker, then with two; losses within 1e-5 of the undisturbed run",
)
def test_elastic(lab: Lab) -> None:
    # With SyncBN, and without dropout: nothing else depends on the number of workers.
    with two_nodes() as cluster:
        second = cluster.add_node(num_cpus=1)
        run = begin(lab, cluster, "cluster.workers={min: 1, max: 2}", *SYNC)
        run.wait_for_step(12)
        assert workers_of(run) == 2, f"not two workers:{run.end_of_text}"
        cluster.remove_node(second, allow_graceful=False)
        run.wait_until(lambda: workers_of(run) == 1, "a start with one worker")
        run.wait_for_step(run.saved + 5)
        cluster.add_node(num_cpus=1)
        run.wait_until(lambda: workers_of(run) == 2, "a start with two workers again")
        run.end(0)
    worst = largest_difference_of_losses(run.folder, lab.undisturbed(*LONG, *SYNC, "cluster.workers=2"))
    assert worst < 1e-5, f"losses differ by {worst:.1e}"
    lab.observe(f"2, 1, then 2 workers; losses differ by {worst:.0e} at most", 2)


@pytest.mark.fault(
    "a spot notice: a node will be taken away in 20 s",
    "saves on the notice, although no checkpoint is due; resumes from it on another node; equal",
)
def test_node_preempted(lab: Lab) -> None:
    settings = ("cluster.workers=1", "checkpoint.every_steps=null", *LONG, "train.epochs=12", "data.limit=8000")
    with two_nodes() as cluster:
        run = begin(lab, cluster, *settings)
        run.wait_for_step(1)  # that of the first epoch's end
        before = run.saved
        leaving = cluster.worker_nodes.copy().pop()
        notice = "--reason DRAIN_NODE_REASON_PREEMPTION --reason-message spot --deadline-remaining-seconds 20"
        node = f"--address {cluster.address} --node-id {leaving.node_id}"
        command = [str(Path(sys.executable).with_name("ray")), "drain-node", *node.split(), *notice.split()]
        drained = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert drained.returncode == 0, drained.stderr
        seconds = run.wait_until(lambda: run.saved > before, "a checkpoint on the notice", 15)
        first = run.saved
        run.wait_until(lambda: run.saved > first, "a checkpoint before the node goes", 20)
        cluster.add_node(num_cpus=1)
        run.wait_for("a node was preempted", 60)
        saved = run.saved
        run.end(0)
    assert "was lost" not in run.text, run.end_of_text
    run.finish_like(lab.undisturbed(*settings), f"resumed after step {saved}")
    lab.observe(f"saved {seconds:.1f} s after the notice, resumed from there; equal")
