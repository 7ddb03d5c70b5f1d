"""Ray clusters of several nodes on one machine: as processes side by side, or as hosts with network, processes, mounts
and name of their own, joined by a bridge (Linux, root)."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from ray_runs import free_ports, is_ray_process, kill_tree, until

BIN = Path(sys.executable).parent
NETWORK = "10.213.77"
OUTSIDE = f"{NETWORK}.254"
"""This side of the bridge."""


@dataclass
class Cluster:
    """A head and another node, one CPU each; the dashboard's address, its clients' environment, the head's folder."""

    address: str
    environment: dict[str, str]
    folder: Path
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def workers(self) -> list[psutil.Process]:
        """The processes that train."""
        families = [psutil.Process(node.pid).children(recursive=True) for node in self.nodes]
        return [child for family in families for child in family if is_ray_process(child, "RayTrainWorker")]

    def densenet_dist(self, *arguments: str | Path, cwd: Path, **options: object) -> subprocess.Popen[str]:
        """The command, with this cluster's token and address."""
        line = [sys.executable, "-m", "densenet_dist", *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "text": True}
        return subprocess.Popen(line, **{"cwd": cwd, "env": self.environment} | pipes | options)  # type: ignore[call-overload]

    def ask(self, path: str) -> Any:
        """What the dashboard answers."""
        request = urllib.request.Request(f"{self.address}{path}")
        request.add_header("Authorization", f"Bearer {self.environment['RAY_AUTH_TOKEN']}")
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)


def settings() -> dict[str, str]:
    """What nodes and clients of one cluster have in common."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    own = {"PATH": f"{BIN}:{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0",
           "RAY_JOB_STOP_WAIT_TIME_S": "20", "OMP_WAIT_POLICY": "passive"}  # fmt: skip
    credentials = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}
    return kept | token | credentials | own


@contextmanager
def two_nodes() -> Iterator[Cluster]:
    """Two nodes under this machine's name, with ports of their own."""
    with tempfile.TemporaryDirectory(prefix="ddn-", dir="/tmp") as folder:  # short: Unix sockets lie in it
        gcs, dashboard, client, *agents = free_ports(9)
        head = _start("--head", "--node-ip-address=127.0.0.1", f"--port={gcs}", f"--dashboard-port={dashboard}",
                      f"--ray-client-server-port={client}", f"--temp-dir={folder}")  # fmt: skip
        # In one folder, a node would unpack the working directory over that of a job that runs on the other node.
        second = _start(f"--address=127.0.0.1:{gcs}", f"--temp-dir={folder}/2")
        for command in (head, second):
            for option in ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port"):
                command.append(f"--{option}={agents.pop()}")
        with _running(f"http://127.0.0.1:{dashboard}", Path(folder), head, second) as cluster:
            yield cluster


@contextmanager
def two_hosts(local: Path) -> Iterator[Cluster]:
    """Two hosts, ``host1`` (the head) and ``host2``, with the addresses 10.213.77.1 and .2, and this process at .254.

    Of all folders, each has only `local` for itself. PermissionError where such hosts cannot be made.
    """
    with tempfile.TemporaryDirectory(prefix="ddh-", dir="/tmp") as name, _bridge():
        folder = Path(name)
        head = _start("--head", f"--node-ip-address={NETWORK}.1", "--port=6379", f"--dashboard-host={NETWORK}.1",
                      f"--temp-dir={folder}/ray")  # fmt: skip
        second = _start(f"--address={NETWORK}.1:6379", f"--node-ip-address={NETWORK}.2")
        commands = (_on_host(1, head, folder, local), _on_host(2, second, folder, local))
        with _running(f"http://{NETWORK}.1:8265", folder, *commands) as cluster:
            yield cluster


def _start(*options: str) -> list[str]:
    few = ("--num-cpus=1", "--num-gpus=0", "--object-store-memory=100000000", "--disable-usage-stats")
    return [str(BIN / "ray"), "start", "--block", *options, *few]


@contextmanager
def _running(address: str, folder: Path, *commands: Sequence[str]) -> Iterator[Cluster]:
    """Start nodes one after the other, each when the one before is alive; end them all."""
    cluster = Cluster(address, settings(), folder)

    def alive() -> bool:
        assert cluster.nodes[-1].poll() is None, log.read_text()
        with suppress(OSError):
            found = cluster.ask("/api/v0/nodes?filter_keys=state&filter_predicates=%3D&filter_values=ALIVE")
            return len(found["data"]["result"]["result"]) >= len(cluster.nodes)
        return False

    try:
        for command in commands:
            log = folder / f"node-{len(cluster.nodes)}.log"
            with open(log, "wb") as file:
                node = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=cluster.environment)
            cluster.nodes.append(node)
            until(alive)
        yield cluster
    finally:
        for node in cluster.nodes:
            kill_tree(node)


@contextmanager
def _bridge() -> Iterator[None]:
    _remove_bridge()  # of a test that was killed
    try:
        _ip("link add ddbr0 type bridge")
        _ip(f"addr add {OUTSIDE}/24 dev ddbr0")
        _ip("link set ddbr0 up")
        for number in (1, 2):
            _ip(f"netns add ddh{number}")
            _ip(f"link add ddv{number} type veth peer name eth0 netns ddh{number}")
            _ip(f"link set ddv{number} master ddbr0 up")
            _ip(f"-n ddh{number} addr add {NETWORK}.{number}/24 dev eth0")
            _ip(f"-n ddh{number} link set eth0 up")
            _ip(f"-n ddh{number} link set lo up")
        yield
    finally:
        _remove_bridge()


def _remove_bridge() -> None:
    for command in ("netns del ddh1", "netns del ddh2", "link del ddbr0"):
        with suppress(PermissionError):
            _ip(command)


def _ip(command: str) -> None:
    if shutil.which("ip") is None:
        raise PermissionError("there is no ip command (iproute2)")
    done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
    if done.returncode != 0:
        raise PermissionError(f"ip {command}: {done.stderr.strip()}")


def _on_host(number: int, command: Sequence[str], folder: Path, local: Path) -> list[str]:
    """A command line that runs `command` there; what it starts ends with it."""
    names = folder / f"hosts-{number}"
    # As Debian writes it: a host's own name is a loopback address, which others cannot reach.
    others = "".join(f"{NETWORK}.{other} host{other}\n" for other in (1, 2) if other != number)
    names.write_text(f"127.0.0.1 localhost\n127.0.1.1 host{number}\n{others}")
    steps = (
        f"hostname host{number}",
        f"mount --bind {names} /etc/hosts",
        f"mkdir -p {folder}/ray {local}",
        f"mount -t tmpfs none {folder}/ray",
        f"mount -t tmpfs none {local}",
        f"exec {shlex.join(command)}",
    )
    space = ["unshare", "--pid", "--fork", "--mount", "--uts", "--ipc", "--mount-proc", "--kill-child"]
    return ["ip", "netns", "exec", f"ddh{number}", *space, "bash", "-c", " && ".join(steps)]
