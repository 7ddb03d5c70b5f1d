"""DistributedDataParallel with gradient buckets that fit the dense blocks, and exchange of requests between ranks.

DDP reduces gradients in buckets during the backward pass (Li et al. 2020, "PyTorch Distributed", sec. 3.2). Its
default of 25 MiB is larger than most DenseNets: the notebook's 14 MB would be sent at once, after the last gradient.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from densenet_dist.model import DenseNet
from densenet_dist.model.sync_bn import synchronize_batchnorm
from densenet_dist.schema import Config, TrainConfig
from densenet_dist.train.context import RunContext
from densenet_dist.train.control import StopRequest, collective
from densenet_dist.train.metrics import gather_ranks

SMALLEST_BUCKET: Final = 2**20
"""Bytes below which a block's gradients are sent with those of the next: latency dominates smaller messages. DDP's
own first bucket has the same size (``torch.distributed._DEFAULT_FIRST_BUCKET_BYTES``)."""
MAX_SYNC_STEPS: Final = 50
"""Steps between two calls of `RankSync.exchange` at most: each is a host sync and a collective call."""
_SYNC_EVERY_S: Final = 0.5
_NEVER: Final = torch.iinfo(torch.int64).max


def wrap(model: DenseNet, config: Config, context: RunContext, precision: AbstractContextManager[Any]) -> nn.Module:
    """Wrap `model` for training: data-parallel if there are several ranks, compiled if configured.

    A collective call.

    Args:
        model: on its device, in training mode.
        config: configuration of the run.
        context: context of this rank.
        precision: autocast context of the forward pass.
    """
    forward = _data_parallel(model, config, context, precision) if context.world_size > 1 else model
    return cast(nn.Module, torch.compile(forward)) if config.train.compile else forward


def bucket_sizes(model: DenseNet, train: TrainConfig) -> list[int]:
    """Return the sizes of DDP's gradient buckets in bytes, in the order of the backward pass; the last takes the rest.

    By default a bucket has the gradients of one dense block and the transition after it. The fused form produces them
    all at once, so smaller buckets would not be sent earlier, and larger ones would wait for the next block. Blocks of
    less than `SMALLEST_BUCKET` are combined.
    """
    if train.bucket_mb is not None:
        return [int(train.bucket_mb * 2**20)]
    sizes, held = [], 0
    for stage in _stages(model):
        held += stage
        if held >= SMALLEST_BUCKET:
            sizes.append(held)
            held = 0
    return [*sizes, held] if held else sizes


def _stages(model: DenseNet) -> list[int]:
    """Return the bytes of gradients of each dense block and the layers up to the next one, the last block first.

    The stem belongs to the first block, the last normalisation and the classifier to the last.
    """
    stages = [0]
    for name, module in [*model.features.named_children(), ("classifier", model.classifier)]:
        if name.startswith("denseblock") and name != "denseblock1":
            stages.append(0)
        stages[-1] += sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
    return stages[::-1]


def _data_parallel(
    model: DenseNet, config: Config, context: RunContext, precision: AbstractContextManager[Any]
) -> DistributedDataParallel:
    train, device = config.train, context.device
    module = synchronize_batchnorm(model) if train.sync_bn else model
    limits = bucket_sizes(model, train)
    if train.compile:  # torch.compile requires a limit of at least DDP's first bucket; the last bucket takes the rest
        limits[-1] = max(limits[-1], SMALLEST_BUCKET)
    parallel = DistributedDataParallel(
        module,
        [device.index] if device.type == "cuda" else None,
        broadcast_buffers=False,
        # Gradients live in the buckets: no copies, and no second memory of the parameters' size.
        gradient_as_bucket_view=True,
        # Every step uses every parameter once. A static graph allows reentrant backward passes (checkpointed blocks).
        # It cannot be used with no_sync, where torch loses count (pytorch/pytorch#187732), or with torch.compile, which
        # splits the graph where buckets end (#93672).
        static_graph=train.grad_accum_steps == 1 and not train.compile,
        # In MiB, and exact, because the divisor is a power of two.
        bucket_cap_mb_list=cast(Any, [limit / 2**20 for limit in limits]),
    )
    if train.gradient_compression == "bf16":
        parallel.register_comm_hook(None, bf16_compress_hook)
    _settle_buckets(parallel, config.data.side, device, precision)
    return parallel


def _settle_buckets(
    parallel: DistributedDataParallel, side: int, device: torch.device, precision: AbstractContextManager[Any]
) -> None:
    """Run backward passes and discard the gradients, so that DDP has its final buckets before the first step.

    DDP fills its buckets in the order of the parameters at first, then in the order in which gradients are ready: with
    a static graph after two passes, else after one. With three or more ranks, the rounding of a sum over ranks depends
    on the position in the bucket: without this, the first steps after a restart would differ from the original ones.
    """
    kept = [buffer.clone() for buffer in parallel.module.buffers()]
    images = torch.zeros(2, 3, side, side, device=device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for _ in range(2):
            with precision:
                logits = parallel(images)
            logits.float().sum().backward()
            parallel.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, value in zip(parallel.module.buffers(), kept, strict=True):
            buffer.copy_(value)


def no_sync(forward: nn.Module) -> AbstractContextManager[Any]:
    """Return a context without the exchange of gradients, if there is one."""
    inner = getattr(forward, "_orig_mod", forward)  # the module that torch.compile wraps
    return inner.no_sync() if isinstance(inner, DistributedDataParallel) else nullcontext()


@torch.no_grad()
def sync_from_rank0(tensors: list[Tensor]) -> None:
    """Copy rank 0's values to every rank. A collective call.

    BatchNorm's running statistics differ by rank while training (only rank 0's are kept), so they are shared before
    an evaluation rather than before every step, as DDP does by default.
    """
    if dist.is_initialized():
        with collective():
            for tensor in tensors:
                dist.broadcast(tensor, src=0)


class RankSync:
    """Exchanges stop requests and non-finite losses, so that all ranks act on them at the same step.

    The ranks exchange after the first step of the process, then about twice a second by rank 0's clock, and at least
    every `MAX_SYNC_STEPS` steps.
    """

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._first_bad_step = torch.full((), _NEVER, dtype=torch.int64, device=context.device)
        self._interval = 1
        self._steps = 0
        self._exchanged = time.perf_counter()

    @torch.no_grad()
    def watch(self, loss: Tensor, step: int) -> None:
        """Check the loss of a step, a () tensor, without a host sync."""
        self._first_bad_step = torch.where(
            torch.isfinite(loss), self._first_bad_step, self._first_bad_step.clamp(max=step)
        )

    def due(self) -> bool:
        """Return whether to exchange after this step: the same on every rank. To be called once per step."""
        self._steps += 1
        alone = self._context.world_size == 1
        return self._steps >= self._interval or (alone and self._context.status.requested is not StopRequest.NONE)

    def exchange(self, request: StopRequest = StopRequest.NONE) -> tuple[int | None, StopRequest]:
        """Exchange this rank's pending request, or a greater one of its own. A collective call.

        Returns:
            The first step with a NaN or infinite loss on any rank, or None; the greatest request of any rank.
        """
        status = self._context.status
        pending = status.requested  # another thread may set it at any time
        own = torch.tensor([max(request, pending), self._next_interval()], device=self._context.device)
        rows = gather_ranks(torch.cat([self._first_bad_step[None], own])).tolist()
        self._interval, self._steps = rows[0][2], 0
        if pending is StopRequest.SAVE and status.requested is StopRequest.SAVE:
            status.requested = StopRequest.NONE  # the caller saves
        step = min(row[0] for row in rows)
        return None if step == _NEVER else step, StopRequest(max(row[1] for row in rows))

    def _next_interval(self) -> int:
        now = time.perf_counter()
        step_s = (now - self._exchanged) / max(self._steps, 1)
        self._exchanged = now
        return max(1, min(2 * self._interval, int(_SYNC_EVERY_S / step_s), MAX_SYNC_STEPS))
