"""Simulate the control traffic of 8, 64 and 1,000 workers on one machine: health checks, heartbeats, restarts.

    python benchmarks/simulate_workers.py [--workers 8 64 1000] [--processes 100] [--out results.json]

Ray Train's poll of its worker group, the `Coordinator` and its heartbeats, Ray's actors and calls, and the checkpoint
of the notebook's network are real. A worker is an actor that answers polls and sends heartbeats, and trains nothing;
with more workers than --processes, several share one actor. There is no network: on a cluster a round waits for it too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import ray
import torch
import torch.distributed as dist
from measuring import number, print_table
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus
from torch.multiprocessing.spawn import start_processes

from densenet_dist.cluster.coordinator import Coordinator, on_this_node
from densenet_dist.cluster.heartbeat import Heartbeat, heartbeat_interval
from densenet_dist.cluster.ray_backend import poll_interval
from densenet_dist.environment import describe_environment
from densenet_dist.model.variants import densenet
from densenet_dist.schema import OptimizerConfig
from densenet_dist.train.optim import build_optimizer
from densenet_dist.train.ranks import broadcast
from densenet_dist.train.snapshot import Position, Snapshot, read_snapshot, write_snapshot

ROUNDS, SECONDS = 20, 20


class Worker:
    """Stands in for one or more workers of Ray Train."""

    def poll_status(self) -> WorkerStatus:
        return WorkerStatus(running=True, error=None, training_report=None)

    def send_heartbeats(self, coordinator: Any, ranks: list[int], world_size: int) -> None:
        """Send heartbeats as often as workers do, for `SECONDS`."""
        interval_s, started = heartbeat_interval(world_size), time.monotonic()
        due = [(started + interval_s * rank / world_size, rank) for rank in ranks]
        while due[0][0] < started + SECONDS:
            at, rank = due.pop(0)
            time.sleep(max(0.0, at - time.monotonic()))
            ray.get(coordinator.heartbeat.remote(state_of(rank, world_size)))
            due.append((at + interval_s, rank))


def state_of(rank: int, world_size: int) -> Heartbeat:
    """The heartbeat of a worker that trains."""
    return Heartbeat(rank, world_size, "host", 100, 1, 100, "train", 0.1, 1.0, "", waits_for_ranks=False)


def control_traffic(workers: int, actors: list[Any]) -> dict[str, float]:
    """Measure the controller's poll and the coordinator's load with this number of workers."""
    group = WorkerGroup.__new__(WorkerGroup)  # only the poll is run, which needs the workers alone
    group._world_rank_to_ongoing_poll, group._worker_health_check_timeout_s = {}, 600.0
    ranks = [SimpleNamespace(actor=actors[rank % len(actors)]) for rank in range(workers)]
    vars(group)["get_workers"] = lambda: ranks
    rounds = []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        group._poll_workers_and_collect_errors(timeout=5.0)
        rounds.append(1e3 * (time.perf_counter() - started))

    coordinator = on_this_node(Coordinator).remote(hang_timeout_s=300.0)
    shares = [(actor, list(range(index, workers, len(actors)))) for index, actor in enumerate(actors)]
    shares = [(actor, mine) for actor, mine in shares if mine]
    for rank in range(workers):  # so that the coordinator knows all of them
        ray.get(coordinator.heartbeat.remote(state_of(rank, workers)))
    process = psutil.Process(ray.get(coordinator.__ray_call__.remote(lambda _: os.getpid())))
    before = sum(process.cpu_times()[:2])
    ray.get([actor.send_heartbeats.remote(coordinator, mine, workers) for actor, mine in shares])
    busy_s = sum(process.cpu_times()[:2]) - before
    delays = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        ray.get(coordinator.heartbeat.remote(state_of(0, workers)))
        delays.append(1e3 * (time.perf_counter() - started))
    ray.kill(coordinator)
    return {
        "workers": workers,
        "poll_interval_s": poll_interval(workers),
        "poll_ms": statistics.median(rounds[1:]),
        "heartbeats_per_s": workers / heartbeat_interval(workers),
        "coordinator_load": busy_s / SECONDS,
        "heartbeat_ms": statistics.median(delays),
    }


def restart(ranks: int) -> dict[str, float]:
    """Measure reading a checkpoint of the notebook's network on rank 0, and its broadcast to ranks on this machine."""
    model = densenet(variant="notebook", num_classes=10)
    optimizer = build_optimizer(model, OptimizerConfig(), lr=0.1)
    model(torch.zeros(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    snapshot = Snapshot(model.state_dict(), model.state_dict(), {"optimizer": optimizer.state_dict()}, Position(), {})
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "step")
        write_snapshot(checkpoint, snapshot)
        size = sum(file.stat().st_size for file in checkpoint.iterdir())
        started = time.perf_counter()
        read_snapshot(checkpoint, Position(), {})
        read_ms = 1e3 * (time.perf_counter() - started)
        start_processes(broadcast_rank, (ranks, str(checkpoint), folder), ranks, start_method="spawn")
        sent_ms = max(float(Path(folder, f"{rank}.txt").read_text()) for rank in range(ranks))
    return {"bytes": size, "read_ms": read_ms, "ranks": ranks, "broadcast_ms": sent_ms}


def broadcast_rank(rank: int, ranks: int, checkpoint: str, folder: str) -> None:
    """Broadcast the checkpoint from rank 0, as a restarted run does; write the milliseconds to a file."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", world_size=ranks, rank=rank)
    snapshot = read_snapshot(Path(checkpoint), Position(), {}) if rank == 0 else None
    dist.barrier()
    started = time.perf_counter()
    broadcast(snapshot)
    Path(folder, f"{rank}.txt").write_text(f"{1e3 * (time.perf_counter() - started)}")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 64, 1000])
    parser.add_argument("--processes", type=int, default=100)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    again = restart(8)
    processes = min(arguments.processes, max(arguments.workers))
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    actors = [ray.remote(num_cpus=0)(Worker).remote() for _ in range(processes)]
    ray.get([actor.poll_status.remote() for actor in actors])
    rows = [control_traffic(workers, actors[:workers]) for workers in arguments.workers]
    ray.shutdown()
    headings = ["workers", "poll every\ns", "poll\nms", "heartbeats\n/s", "coordinator\ncores", "heartbeat\nms"]
    print_table(f"control traffic, {processes} processes", headings, [list(map(number, row.values())) for row in rows])
    print(
        f"restart: {again['bytes'] / 2**20:.0f} MiB read and verified by rank 0 in {again['read_ms']:.0f} ms, "
        f"broadcast to {again['ranks']} ranks in {again['broadcast_ms']:.0f} ms"
    )
    if arguments.out:
        found = {"rows": rows, "restart": again, "processes": processes, "environment": describe_environment()}
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
