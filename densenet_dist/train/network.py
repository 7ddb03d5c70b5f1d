"""Build the network of a configuration, and wrap it for training: autocast, DistributedDataParallel, torch.compile.

DDP reduces gradients in buckets during the backward pass (Li et al. 2020, "PyTorch Distributed", sec. 3.2). Its
default of 25 MiB is larger than most DenseNets: the notebook's 14 MB would be sent at once, after the last gradient.
So the buckets follow the dense blocks.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final, cast

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from densenet_dist.custom import is_custom, step_errors
from densenet_dist.errors import is_out_of_memory
from densenet_dist.model import DenseNet
from densenet_dist.model.sync_bn import synchronize_batchnorm
from densenet_dist.model.variants import densenet
from densenet_dist.schema import Config, ModelConfig, TrainConfig
from densenet_dist.train.context import RunContext
from densenet_dist.train.custom_parts import custom_model

AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALLEST_BUCKET: Final = 2**20
"""Bytes below which a block's gradients are sent with those of the next: latency dominates smaller messages. DDP's
own first bucket has the same size (``torch.distributed._DEFAULT_FIRST_BUCKET_BYTES``)."""
DEFAULT_BUCKET: Final = 25 * 2**20
"""DDP's default, in bytes."""


def build_model(
    config: ModelConfig,
    num_classes: int,
    image_size: int = 32,
    seed: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build the configured model on the CPU, a `DenseNet` or a custom one, initialized from `seed` if one is given.

    `options` are those of a custom model: ``config.options.model`` of the whole configuration.

    Raises:
        ConfigError: naming every setting that cannot work.
    """
    if seed is not None:
        torch.manual_seed(seed)
    if is_custom(config.variant):
        return custom_model(config.variant, options or {}, num_classes, image_size)
    return densenet(**config.network, num_classes=num_classes, image_size=image_size)


def set_determinism(config: Config, device: torch.device) -> None:
    """Choose deterministic kernels on a GPU, or the fastest ones, as configured."""
    if device.type != "cuda":
        return  # CPU kernels are deterministic at a fixed number of threads
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for Ray's workers, see `choose_device`
    torch.backends.cudnn.benchmark = not config.train.deterministic
    torch.use_deterministic_algorithms(config.train.deterministic)
    # Deterministic mode would also fill new memory with NaN, which is slow and makes no result more deterministic.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the autocast context for a precision; it is disabled for fp32."""
    dtype = AUTOCAST[precision]
    return torch.autocast(device.type, dtype=None if precision == "fp32" else dtype, enabled=precision != "fp32")


@contextmanager
def suppress_out_of_memory() -> Iterator[None]:
    """Suppress the errors for which `is_out_of_memory` is true."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise


def free_memory() -> None:
    """Return what a failed computation held to the device."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def wrap(model: nn.Module, config: Config, context: RunContext, *, several_passes: bool) -> nn.Module:
    """Wrap `model`, on its device, for training: data-parallel for several ranks, compiled if configured.

    A collective call. `several_passes`: whether steps may have several forward passes.
    """
    train, device = config.train, context.device
    forward: nn.Module = model
    custom = is_custom(config.model.variant)
    if context.world_size > 1:
        limits = bucket_sizes(model, train)
        if train.compile:  # it requires a limit of at least DDP's first bucket; the last bucket takes the rest
            limits[-1] = max(limits[-1], SMALLEST_BUCKET)
        forward = DistributedDataParallel(
            synchronize_batchnorm(model) if train.sync_bn else model,
            [device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,
            # Gradients live in the buckets: no copies, and no second memory of the parameters' size.
            gradient_as_bucket_view=True,
            # Every step uses every parameter once. A static graph allows reentrant backward passes (checkpointed
            # blocks). It cannot be used with no_sync, where torch loses count (pytorch/pytorch#187732), or with
            # torch.compile, which splits the graph where buckets end (#93672).
            # Custom models may differ from step to step, and leave parameters out.
            static_graph=not several_passes and not train.compile and not custom,
            find_unused_parameters=custom,
            # In MiB, and exact, because the divisor is a power of two.
            bucket_cap_mb_list=cast(Any, [limit / 2**20 for limit in limits]),
        )
        if train.gradient_compression == "bf16":
            forward.register_comm_hook(None, bf16_compress_hook)
        _settle_buckets(forward, config, device)
    return cast(nn.Module, torch.compile(forward)) if train.compile else forward


def bucket_sizes(model: nn.Module, train: TrainConfig) -> list[int]:
    """Return the sizes of DDP's gradient buckets in bytes, in the order of the backward pass; the last takes the rest.

    By default a bucket has the gradients of one dense block and the transition after it. The fused form produces them
    all at once, so smaller buckets would not be sent earlier, and larger ones would wait for the next block. Blocks of
    less than `SMALLEST_BUCKET` are combined. For custom models it is DDP's default.
    """
    if train.bucket_mb is not None:
        return [int(train.bucket_mb * 2**20)]
    if type(model) is not DenseNet:
        return [DEFAULT_BUCKET]
    sizes, held = [], 0
    for stage in _stages(model):
        held += stage
        if held >= SMALLEST_BUCKET:
            sizes.append(held)
            held = 0
    return [*sizes, held] if held else sizes


def _stages(model: DenseNet) -> list[int]:
    """Return the bytes of gradients of each dense block and the layers up to the next one, the last block first.

    The stem belongs to the first block, the last normalization and the classifier to the last.
    """
    stages = [0]
    for name, module in [*model.features.named_children(), ("classifier", model.classifier)]:
        if name.startswith("denseblock") and name != "denseblock1":
            stages.append(0)
        stages[-1] += sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
    return stages[::-1]


def _settle_buckets(parallel: DistributedDataParallel, config: Config, device: torch.device) -> None:
    """Run backward passes and discard the gradients, so that DDP has its final buckets before the first step.

    DDP fills its buckets in the order of the parameters at first, then in the order in which gradients are ready: with
    a static graph after two passes, else after one. With three or more ranks, the rounding of a sum over ranks depends
    on the position in the bucket: without this, the first steps after a restart would differ from the original ones.
    """
    kept = [buffer.clone() for buffer in parallel.module.buffers()]
    size = config.data.resolved_image_size
    images = torch.zeros(2, 3, size, size, device=device)
    # With find_unused_parameters, PyTorch warns about a model that uses all of them.
    ignored = warnings.catch_warnings(action="ignore")
    with ignored, step_errors("model", config), torch.random.fork_rng([device] if device.type == "cuda" else []):
        for _ in range(2):
            with autocast(device, config.train.precision):
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
