"""How fast this project's DenseNets train, and in how much memory, beside torchvision's, timm's and Keras'.

    .venv/bin/pip install -r benchmarks/requirements-peers.txt
    python benchmarks/peers.py --nets notebook bc100 --batch 32 --rounds 3 --out peers.json
    python benchmarks/peers.py --device cuda --batch 256 --rounds 5 --out peers_gpu.json

Nets (--nets): `notebook`, 4 blocks of 12 layers without bottlenecks, k = 35; `bc100`, DenseNet-BC 100/12 for CIFAR,
for which torchvision and timm get one 3x3 convolution as their stem; `densenet121` at 224x224 for 1000 classes. The
last two are the same net everywhere, and nothing is measured before that is shown: with the same weights, logits,
gradients and running statistics agree in float64 to 1e-9. torchvision and timm have no such net as the notebook's: how
theirs differ is printed, with parameters and multiplications.

Peers (--peers): this project's forms of the dense block, `ours_reference`, `ours_fused`, and `ours_checkpointed` with
torch.utils.checkpoint around each block, always channels_last; torchvision's and timm's nets as they come (NCHW) and
`+channels_last`, with their own `memory_efficient` and under torch.compile (`compiled`; by default on a GPU only, else
with --compiled); Keras with TensorFlow on the CPU, the notebook's own system, by train_on_batch. What is not installed
is left out; --keras-python names another Python for Keras, in which tensorflow and numpy are enough.

A step is forward, cross entropy, backward and SGD with momentum on one batch that stays where it is; Keras is given it
as NumPy arrays and does all in one. Each peer has a process of its own, which waits while another is measured; the
rounds go through all of them, every second one backwards. Each round begins with a step that does not count. Memory is
the most while measured: on a GPU what torch has allocated, weights and all; on a CPU the resident size beyond that
before the first step. What the first steps alone take, to compile or to choose kernels, counts neither in time nor in
the peak.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import peer_nets
from peer_worker import PEERS, Task
from rich.console import Console
from rich.table import Table

from densenet_dist.environment import describe_environment

WORKER = Path(__file__).with_name("peer_worker.py")
BATCH = {"cpu": 32, "cuda": 256}
PRECISION = {"cpu": "fp32", "cuda": "bf16"}
OURS = ("ours_fused", "ours_reference")
"""What the others are compared with: the first of these that is there."""
FILE_WIDTH = 140
FIGURES = ("images_per_s", "step_ms", "forward_ms", "backward_ms", "peak_mib")


class Worker:
    """A peer's process, from the side that asks it."""

    def __init__(self, task: Task, python: str) -> None:
        hidden = {} if task.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
        environment = {**os.environ, **hidden, "OMP_NUM_THREADS": str(task.threads), "KERAS_BACKEND": "tensorflow",
                       "TF_CPP_MIN_LOG_LEVEL": "2"}  # fmt: skip
        command = [python, str(WORKER), json.dumps(task)]
        self.peer = task.peer
        self.process: Any = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.ready = self._answer()

    def measure(self) -> dict[str, Any]:
        self.process.stdin.write("\n")
        return self._answer()

    def stop(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.peer} ended with {self.process.wait()}; what it said is above")
        return dict(json.loads(line))


def run_rounds(name: str, peers: Iterable[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """All rounds of one net: each round's figures by peer, what each peer is, and why some are left out."""
    workers: dict[str, Worker] = {}
    rounds, ready, left_out = [], {}, {}
    try:
        for peer in peers:
            say(f"{name}: {peer} starts")
            worker = Worker(task_of(name, peer, arguments), python_of(peer, arguments))
            if "left_out" in worker.ready:
                left_out[peer] = worker.ready["left_out"]
                worker.stop()
            else:
                workers[peer], ready[peer] = worker, worker.ready
        for i in range(arguments.rounds):
            say(f"{name}: round {i + 1} of {arguments.rounds}")
            order = list(workers) if i % 2 == 0 else list(reversed(workers))
            rounds.append({peer: workers[peer].measure() for peer in order})
            for peer in [peer for peer in order if "left_out" in rounds[-1][peer]]:
                left_out[peer] = rounds[-1][peer]["left_out"]
                workers.pop(peer).stop()
    finally:
        for worker in workers.values():
            worker.stop()
    rounds = [{peer: one[peer] for peer in workers} for one in rounds]  # none that did not hold out to the end
    return {"rounds": rounds, "summary": summarize(rounds), "peers": ready, "left_out": left_out}


def python_of(peer: str, arguments: argparse.Namespace) -> str:
    return str(arguments.keras_python) if peer == "keras" else sys.executable


def task_of(net: str, peer: str, arguments: argparse.Namespace) -> Task:
    shared = {key: value for key, value in vars(arguments).items() if key in Task._fields}
    return Task(net=net, peer=peer, **shared)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarize(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Median, least and greatest of each figure, and of ours over each peer's in the same round."""
    ours = next((peer for peer in OURS if peer in rounds[0]), None)
    summary = {}
    for peer, first in rounds[0].items():
        summary[peer] = {key: spread([one[peer][key] for one in rounds]) for key in FIGURES if key in first}
        if ours:
            for key, ratio in (("images_per_s", "speed_ours_over_this"), ("peak_mib", "memory_ours_over_this")):
                summary[peer][ratio] = spread([one[ours][key] / one[peer][key] for one in rounds])
    return summary


def compare(name: str, peers: Sequence[str], device: str) -> dict[str, Any]:
    """How large the peers' nets are, and how far from ours: measured where they are the same, told where not."""
    net = peer_nets.NETS[name]
    found: dict[str, Any] = {"sizes": {}, "differences": {}, "same_within": {}}
    for library in dict.fromkeys(("ours", *(PEERS[peer].library for peer in peers))):
        with contextlib.suppress(peer_nets.LeftOut):  # its peers will say why
            if library in peer_nets.LIBRARIES:
                found["sizes"][library] = peer_nets.size_of(net, library)
    if name == "notebook" and found["sizes"]["ours"]["parameters"] != peer_nets.NOTEBOOK_PARAMETERS:
        sys.exit(f"the notebook's net has {peer_nets.NOTEBOOK_PARAMETERS:,} parameters, ours {found['sizes']['ours']}")
    for library in found["sizes"]:
        if library in net.differences:
            found["differences"][library] = net.differences[library]
        elif library != "ours":
            found["same_within"][library] = peer_nets.check_same(net, library, device=device)
    if "ours_fused" in peers:
        with contextlib.suppress(peer_nets.LeftOut, RuntimeWarning):
            found["same_within"]["ours_fused"] = peer_nets.check_same(net, "ours", "fused", device)
    return found


def print_net(name: str, found: dict[str, Any], arguments: argparse.Namespace, console: Console) -> None:
    sizes, net = found["sizes"], peer_nets.NETS[name]
    own = sizes["ours"]
    console.print(
        f"\n[bold]{name}[/]: {net.image_size}x{net.image_size}, {own['parameters']:,} parameters, "
        f"{own['multiply_adds'] / 1e6:,.1f} M multiply-adds an image forward; batch {arguments.batch}, "
        f"{arguments.precision}, {arguments.device}, rounds: {arguments.rounds}; medians (lowest to highest)"
    )
    for other, far in found["same_within"].items():
        console.print(
            f"{other}: the same net within {', '.join(f'{value:.0e} ({part})' for part, value in far.items())}"
        )
    for other, differences in found["differences"].items():
        size = ", ".join(
            f"{sizes[other][key]:,} {what} ({sizes[other][key] / own[key] - 1:+.1%})"
            for key, what in (("parameters", "parameters"), ("multiply_adds", "multiply-adds"))
        )
        console.print(f"{other}: another net, {size}: {differences}")
    console.print(table_of(found["summary"]))
    for peer, reason in found["left_out"].items():
        console.print(f"{peer} is left out: {reason}")


def table_of(summary: dict[str, dict[str, dict[str, float]]]) -> Table:
    ours = next((peer for peer in OURS if peer in summary), "ours")
    columns = {  # heading: figure, its digits, whether its range is shown; the file has every range
        "images/s": ("images_per_s", 1, True),
        "forward ms": ("forward_ms", 1, False),
        "backward ms": ("backward_ms", 1, False),
        "peak MiB": ("peak_mib", 0, False),
        f"{ours} / this: images/s": ("speed_ours_over_this", 2, True),
        "MiB": ("memory_ours_over_this", 2, False),
    }
    table = Table(box=None, pad_edge=False)
    table.add_column("peer", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for peer, figures in summary.items():
        table.add_row(peer, *(cell(figures.get(key), digits, shown) for key, digits, shown in columns.values()))
    return table


def cell(figure: dict[str, float] | None, digits: int, with_range: bool) -> str:
    if figure is None:
        return "-"
    median, low, high = (f"{figure[key]:,.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({low} to {high})" if with_range and low != high else median


def peers_of(net: str, arguments: argparse.Namespace) -> Iterator[str]:
    for name, peer in PEERS.items():
        if arguments.peers and name not in arguments.peers:
            continue
        if peer.library == "keras" and net != "notebook":
            continue
        if arguments.peers or arguments.compiled or not peer.compiled:
            yield name


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def parse_arguments() -> argparse.Namespace:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    nets, device = list(peer_nets.NETS), "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--nets", nargs="+", choices=nets, default=nets, help="default: all")
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="default: all, the compiled ones as --compiled says")
    parser.add_argument(
        "--compiled", action=argparse.BooleanOptionalAction, help="default: on a GPU only; takes minutes"
    )
    parser.add_argument("--device", choices=BATCH, default=device)
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: fp32 on a CPU, bf16 autocast on a GPU")
    parser.add_argument("--batch", type=int, help=f"default: {BATCH['cpu']} on a CPU, {BATCH['cuda']} on a GPU")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: one a CPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="measured of each peer in each round, about")
    parser.add_argument(
        "--keras-python", default=sys.executable, help="a Python that has tensorflow; default: this one"
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arguments.batch = arguments.batch or BATCH[arguments.device]
    arguments.precision = arguments.precision or PRECISION[arguments.device]
    if arguments.compiled is None:
        arguments.compiled = arguments.device == "cuda"
    torch.set_num_threads(arguments.threads)
    return arguments


def main() -> None:
    arguments = parse_arguments()
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else FILE_WIDTH)
    result: dict[str, Any] = {
        "settings": {key: value for key, value in vars(arguments).items() if key != "out"},
        "environment": describe_environment(),
        "nets": {},
    }
    for name in arguments.nets:
        peers = list(peers_of(name, arguments))
        say(f"{name}: whether the nets are the same")
        found = compare(name, peers, arguments.device)
        found |= run_rounds(name, peers, arguments)
        print_net(name, found, arguments, console)
        result["nets"][name] = found
        if arguments.out:  # after each net: what is cut short keeps what it has
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
