"""Clusters whose nodes come and go."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from densenet_dist.chaos.case import case
from densenet_dist.chaos.lab import Lab, Observed, Started, expect, finish, records

_GROUP: Final = "Nodes that come and go"
_LONG: Final = ("train.epochs=40", "data.limit=1300", "train.schedule.name=cosine", "model.drop_rate=0")
_SYNC: Final = ("train.sync_bn=true", "train.lr=0.001")
"""At a high learning rate training itself makes differences of rounding grow."""


@contextmanager
def _cluster() -> Iterator[Any]:
    """A head without room for workers, and one node with a CPU."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()


def _begin(lab: Lab, cluster: Any, *settings: str) -> Started:
    return lab.begin(f"cluster.address={cluster.address}", "cluster.max_failures=9", *_LONG, *settings)


def _world(run: Started) -> int:
    """Workers of the newest start, from what was printed."""
    said = re.findall(r"images a step; (\d+) x|resumed after .*, on (\d+) x", run.text)
    return int(said[-1][0] or said[-1][1]) if said else 0


@case(
    _GROUP,
    "one of two nodes is lost (SIGKILL of its raylet and worker); another one comes later",
    "the run waits, then goes on from the last checkpoint on the new node; equal bit for bit",
)
def node_lost(lab: Lab) -> Observed:
    """A fixed number of workers."""
    settings = (*_LONG, "cluster.workers=2")
    with _cluster() as cluster:
        second = cluster.add_node(num_cpus=1)
        run = _begin(lab, cluster, "cluster.workers=2")
        run.wait_for_step(12)
        cluster.remove_node(second, allow_graceful=False)
        time.sleep(5)
        cluster.add_node(num_cpus=1)
        began = time.monotonic()
        before = run.saved
        run.wait_for_step(before + 3)
        seconds = time.monotonic() - began
        expect(run.wait() == 0, run.text[-2000:])
    finish(run, lab.undisturbed(*settings))
    return Observed(f"went on {seconds:.0f} s after the new node came; equal", 1, {})


@case(
    _GROUP,
    "workers: {min: 1, max: 2}; one of two nodes is lost, later another one comes",
    "goes on with one worker, then with two; the same global batches: losses within 1e-5",
)
def elastic(lab: Lab) -> Observed:
    """With SyncBN, and without dropout: all else does not depend on the world's size."""
    with _cluster() as cluster:
        second = cluster.add_node(num_cpus=1)
        run = _begin(lab, cluster, "cluster.workers={min: 1, max: 2}", *_SYNC)
        run.wait_for_step(12)
        expect(_world(run) == 2, f"not two workers:\n{run.text}")
        cluster.remove_node(second, allow_graceful=False)
        run.wait_until(lambda: _world(run) == 1, "a start with one worker")
        run.wait_for_step(run.saved + 5)
        cluster.add_node(num_cpus=1)
        run.wait_until(lambda: _world(run) == 2, "a start with two workers again")
        expect(run.wait() == 0, run.text[-2000:])
    like = lab.undisturbed(*_LONG, *_SYNC, "cluster.workers=2")
    pairs = zip(records(run.folder), records(like), strict=True)
    worst = max(abs(one[key] - other[key]) for one, other in pairs for key in one if key.endswith("/loss"))
    expect(worst < 1e-5, f"losses differ by {worst:.1e}")
    return Observed(f"2, 1, then 2 workers; losses differ by {worst:.0e} at most", 2, {})


@case(
    _GROUP,
    "a spot notice: Ray is told that a node will be taken away in 20 s",
    "a checkpoint is written on the notice, though none was due; then the node is gone: the run goes on from there on "
    "another one, equal bit for bit",
)
def node_preempted(lab: Lab) -> Observed:
    """As cloud providers' notices reach Ray: a drain with a deadline."""
    settings = ("cluster.workers=1", "checkpoint.every_steps=null", *_LONG, "train.epochs=6", "data.limit=8000")
    with _cluster() as cluster:
        run = _begin(lab, cluster, *settings)
        run.wait_for_step(1)  # that of the first epoch's end
        before = run.saved
        leaving = cluster.worker_nodes.copy().pop()
        _drain(cluster.address, leaving.node_id)
        seconds = run.wait_until(lambda: run.saved > before, "a checkpoint on the notice", 15)
        saved = run.saved
        cluster.remove_node(leaving, allow_graceful=False)
        cluster.add_node(num_cpus=1)
        expect(run.wait() == 0, run.text[-2000:])
    finish(run, lab.undisturbed(*settings))
    expect(f"resumed after step {saved}" in run.text, f"it did not go on from step {saved}:\n{run.text[-2000:]}")
    figures = {"seconds from notice to checkpoint": [seconds]}
    return Observed(f"saved {seconds:.1f} s after the notice, went on from there; equal", 1, figures)


def _drain(address: str, node: str) -> None:
    ray = str(Path(sys.executable).parent / "ray")
    command = [ray, "drain-node", "--address", address, "--node-id", node, "--reason"]
    command += ["DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    expect(done.returncode == 0, done.stderr)
