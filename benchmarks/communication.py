"""What data-parallel training loses to communication: a model that needs neither a GPU nor a network.

All-reduces follow the latency-bandwidth model, in which a message of b bytes takes latency + b / bandwidth (Thakur,
Rabenseifner and Gropp 2005, "Optimization of Collective Communication Operations in MPICH", sec. 3). For n workers and
a message of S bytes:

- ring: 2(n-1) latencies + 2(n-1)/n S / bandwidth; no algorithm sends less (Patarasuk and Yuan 2009, "Bandwidth optimal
  all-reduce algorithms for clusters of workstations"; Sergeev and Del Balso 2018, "Horovod");
- tree: NCCL's, a chain inside each node and two complementary binary trees between m nodes (Sanders, Speck and Traeff
  2009): 2(n/m - 1) latencies inside + 2 log2(m) latencies between + 2 S / (0.9 bandwidth).

The faster one counts, as in NCCL's own tuner (``ncclTopoTuneModel`` in its src/graph/tuning.cc), which the latencies,
the tree's 0.9 and the share of a bandwidth that payload gets (0.92) are from.

DDP reduces a bucket of gradients as soon as the backward pass has filled it, one bucket after the other; what then
outlasts the backward pass is exposed (Li et al. 2020, "PyTorch Distributed", sec. 3.2). Left out: that communication
takes cores, or streaming multiprocessors, from computation; that ranks wait for the slowest; congestion.

`predict_scaling.py` applies it to a net.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

PAYLOAD: Final = 0.92
"""Share of a bandwidth that NCCL counts on for data: its LL128 protocol sends 120 bytes in 128."""
_TREE_BANDWIDTH: Final = 0.9
_RING_START_S: Final = 10.0e-6
_TREE_START_S: Final = 4.4e-6


@dataclass(frozen=True)
class Link:
    """One kind of connection.

    Attributes:
        name: with its line rate.
        bytes_per_s: of payload, in one direction.
        ring_latency_s: of a hop in a ring.
        tree_latency_s: of a level in a tree; infinite where there are no trees.
    """

    name: str
    bytes_per_s: float
    ring_latency_s: float
    tree_latency_s: float = math.inf


@dataclass(frozen=True)
class Fabric:
    """How workers are connected.

    Attributes:
        name: for people.
        inside: the connection of workers of one node, for each worker.
        between: that of nodes, for each adapter; None where all workers are in one node, however many.
        node_size: workers of a node.
        adapters: network adapters of a node.
        ring_start_s: what a ring all-reduce takes before its first hop.
        tree_start_s: likewise a tree.
    """

    name: str
    inside: Link
    between: Link | None = None
    node_size: int = 8
    adapters: int = 1
    ring_start_s: float = 0.0
    tree_start_s: float = 0.0


# NVLink 4: 18 links of 25 GB/s, of which NCCL counts on 20.6 (SM90_NVLINK_BW in its src/graph/topo.h).
NVLINK: Final = Link("NVLink 4", 18 * 20.6e9 * PAYLOAD, 1.9e-6, 1.2e-6)
INFINIBAND: Final = Link("400 Gbit/s InfiniBand", 400e9 / 8 * PAYLOAD, 4.0e-6, 8.5e-6)
# Latency through the kernel's TCP stack and host memory: an assumption, not from NCCL.
ETHERNET: Final = Link("25 Gbit/s Ethernet", 25e9 / 8 * PAYLOAD, 30e-6, 30e-6)

FABRICS: Final = (
    Fabric("NVLink 4 between all GPUs", NVLINK, NVLINK, 8, 1, _RING_START_S, _TREE_START_S),
    # As in a DGX H100: one adapter a GPU.
    Fabric("8 GPUs a node, 8 x 400G InfiniBand", NVLINK, INFINIBAND, 8, 8, _RING_START_S, _TREE_START_S),
    Fabric("8 GPUs a node, 1 x 25G Ethernet", NVLINK, ETHERNET, 8, 1, _RING_START_S, _TREE_START_S),
)
"""What predictions are made for. NVLink alone joins the 8 Hopper GPUs of a machine; beyond them it is a bound."""


def all_reduce_s(message: float, workers: int, fabric: Fabric) -> float:
    """Seconds of one all-reduce of `message` bytes on an idle network."""
    if workers <= 1 or message <= 0:
        return 0.0
    return min(ring_s(message, workers, fabric), tree_s(message, workers, fabric))


def ring_s(message: float, workers: int, fabric: Fabric) -> float:
    """Seconds of a ring over all workers; it passes through every node once, on all of its adapters."""
    nodes, bandwidth = _nodes(workers, fabric), _bandwidth(workers, fabric)
    across = 0.0 if fabric.between is None or nodes == 1 else 2 * (nodes - 1) * fabric.between.ring_latency_s
    hops = 2 * (workers - 1) - (2 * (nodes - 1) if nodes > 1 else 0)
    latency = fabric.ring_start_s + hops * fabric.inside.ring_latency_s + across
    return latency + 2 * (workers - 1) / workers * message / bandwidth


def tree_s(message: float, workers: int, fabric: Fabric) -> float:
    """Seconds of a chain inside each node and a double binary tree between nodes."""
    nodes, bandwidth = _nodes(workers, fabric), _bandwidth(workers, fabric)
    across = 0.0 if fabric.between is None or nodes == 1 else 2 * math.log2(nodes) * fabric.between.tree_latency_s
    chain = math.ceil(workers / nodes) - 1
    inside = 2 * chain * fabric.inside.tree_latency_s if chain else 0.0
    return fabric.tree_start_s + inside + across + 2 * message / (_TREE_BANDWIDTH * bandwidth)


def _nodes(workers: int, fabric: Fabric) -> int:
    return 1 if fabric.between is None else math.ceil(workers / fabric.node_size)


def _bandwidth(workers: int, fabric: Fabric) -> float:
    """Of the narrowest part of a way through all workers."""
    if fabric.between is None or _nodes(workers, fabric) == 1:
        return fabric.inside.bytes_per_s
    return min(fabric.inside.bytes_per_s, fabric.between.bytes_per_s * fabric.adapters)


@dataclass(frozen=True)
class Bucket:
    """Gradients that are reduced together.

    Attributes:
        message: bytes that are sent.
        ready: when the backward pass has filled it, as a share of the step without communication.
    """

    message: float
    ready: float


@dataclass(frozen=True)
class Step:
    """A training step of one worker.

    Attributes:
        compute_s: seconds without communication: forward, backward, optimizer.
        buckets: in the order in which they are filled.
        blocking: bytes of further all-reduces during which nothing is computed (synchronized batch normalization).
    """

    compute_s: float
    buckets: tuple[Bucket, ...]
    blocking: tuple[float, ...] = ()


@dataclass(frozen=True)
class Prediction:
    """A step with communication.

    Attributes:
        step_s: seconds of all of it.
        communication_s: seconds in which the network is busy.
        exposed_s: of these, the seconds in which nothing is computed.
    """

    step_s: float
    communication_s: float
    exposed_s: float


def predict(step: Step, cost: Callable[[float], float], *, overlap: bool = True) -> Prediction:
    """Walk through one step.

    The optimizer waits for the last bucket. That one is filled when the backward pass ends; blocking all-reduces are
    spread evenly over forward and backward pass, so they delay buckets no more than the backward pass itself.

    Args:
        step: of each worker.
        cost: seconds of an all-reduce of so many bytes, such as `all_reduce_s` of some workers and fabric.
        overlap: whether buckets are sent while the backward pass goes on, or all of them after it.
    """
    backward_ends = max((bucket.ready for bucket in step.buckets), default=1.0) * step.compute_s
    free, busy = 0.0, 0.0
    for bucket in step.buckets:
        duration = cost(bucket.message)
        start = max(free, bucket.ready * step.compute_s if overlap else backward_ends)
        free, busy = start + duration, busy + duration
    blocked = sum(map(cost, step.blocking))
    exposed = max(0.0, free - backward_ends) + blocked
    return Prediction(step.compute_s + exposed, busy + blocked, exposed)


def predict_on(step: Step, workers: int, fabric: Fabric, *, overlap: bool = True) -> Prediction:
    """The same step of each of so many workers on a fabric."""
    return predict(step, lambda message: all_reduce_s(message, workers, fabric), overlap=overlap)


def fit_ring(samples: Sequence[tuple[float, float]], workers: int, name: str) -> Fabric:
    """The fabric on which a ring all-reduce takes what was measured.

    Least squares of the relative errors, neither latency nor time a byte below zero.

    Args:
        samples: bytes and seconds of all-reduces, of two sizes at least.
        workers: that took part, two at least.
        name: of the fabric.

    Raises:
        ValueError: with too few sizes or workers there is nothing to fit.
    """
    if workers < 2 or len({message for message, _ in samples}) < 2:
        raise ValueError(f"{workers} workers and {len(samples)} samples leave latency and bandwidth undecided")
    message, seconds = np.array(samples, dtype=np.float64).T
    hops = 2.0 * (workers - 1)
    terms = np.stack([np.full_like(message, hops), hops / workers * message], axis=1)
    latency, per_byte = _fit_nonnegative(terms / seconds[:, None])
    return Fabric(name, Link(name, 1 / per_byte if per_byte > 0 else math.inf, latency))


def _fit_nonnegative(terms: np.ndarray) -> tuple[float, float]:
    """Factors of two columns, neither below zero, whose sum is closest to 1 in every row."""
    ones = np.ones(len(terms))
    both = np.linalg.lstsq(terms, ones)[0]
    if both.min() >= 0:
        return float(both[0]), float(both[1])
    alone = terms.sum(axis=0) / (terms**2).sum(axis=0)  # of each column without the other one
    errors = ((alone * terms - 1) ** 2).sum(axis=0)
    return (float(alone[0]), 0.0) if errors[0] < errors[1] else (0.0, float(alone[1]))
