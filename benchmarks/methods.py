"""Which training methods help a small DenseNet on CIFAR-10, with seeds shared by all: an experiment, in one plain loop.

    python benchmarks/methods.py DATA --methods plain muon_0.01 sam_2 --seeds 0 1 --out methods.jsonl

The network and the recipe are those of configs/cifar10_small.yaml. It is trained on some images of the training set and
evaluated (moving average of the weights) on its last 10,000; the test set is not touched. One process uses one thread:
start two for two cores. A row that the file already has is not trained again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from densenet_dist.data import augment, torch_ops, trivial_augment
from densenet_dist.data.augment import Augmentation, Parameters
from densenet_dist.data.datasets import load_dataset
from densenet_dist.model.dense_block import DenseLayer
from densenet_dist.model.variants import densenet
from densenet_dist.schedules import ScheduleState, one_cycle
from densenet_dist.schema import OptimizerConfig
from densenet_dist.train.optim import WeightAverage, build_optimizer

BATCH, LR, DECAY, HELD_OUT = 128, 0.2, 5e-4, 10_000
Method = dict[str, Any]
"""Settings: ``augmentation``, ``draw`` (replaces `augment.draw`), ``muon`` (its learning rate), ``depth``, ``sam``,
``mix_until`` (share of the epochs with mixing)."""


def rand_augment(base: Augmentation, seed: int, epoch: int, count: int, size: int, *, level: int) -> list[Parameters]:
    """Two of TrivialAugment's operations per image, one after the other, all at strength `level` of 30."""
    generator = np.random.default_rng((seed, epoch, 1))
    crop = augment.draw(base, seed, epoch, count, size)
    passes = []
    for _ in range(2):
        draws = generator.random((count, 3))
        draws[:, 1] = (level + 0.5) / trivial_augment.STRENGTHS
        passes.append(_operation(draws, size))
    return [*passes, crop]


def aug_mix(base: Augmentation, seed: int, epoch: int, count: int, size: int, *, level: int) -> list[Any]:
    """AugMix (Hendrycks et al. 2020) without its consistency loss: three chains of one to three operations, mixed."""
    generator = np.random.default_rng((seed, epoch, 2))
    chains = []
    for _ in range(3):
        chain, depth = [], generator.integers(1, 4, count)
        for place in range(3):
            draws = generator.random((count, 3))
            draws[:, 1] *= level / trivial_augment.STRENGTHS
            draws[depth <= place, 0] = 0.0  # the identity
            chain.append(_operation(draws, size))
        chains.append(chain)
    weights = generator.dirichlet((1.0, 1.0, 1.0), count).astype(np.float32)
    share = generator.beta(1.0, 1.0, count).astype(np.float32)
    return [chains, weights, share, augment.draw(base, seed, epoch, count, size)]


def random_erasing(base: Augmentation, seed: int, epoch: int, count: int, size: int, *, share: float) -> Parameters:
    """Zero a rectangle of 2 to 33 % of the area, sides 0.3 to 3.3, in `share` of the images (Zhong et al. 2020)."""
    draws = np.random.default_rng((seed, epoch, 3)).random((count, 5))
    area = (0.02 + 0.31 * draws[:, 0]) * size**2
    root = np.exp((2 * draws[:, 1] - 1) * math.log(3.3) / 2)
    sides = np.minimum(np.rint(np.stack([np.sqrt(area) * root, np.sqrt(area) / root], 1)), size - 1).astype(np.int64)
    corner = np.floor(draws[:, 2:4] * (size - sides + 1)).astype(np.int64)
    hole = np.concatenate([corner, corner + sides], 1)
    hole[draws[:, 4] >= share] = 0
    return replace(augment.draw(base, seed, epoch, count, size), hole=hole)


def _operation(draws: npt.NDArray[np.float64], size: int) -> Parameters:
    drawn = trivial_augment.draw(draws, size)
    affine = np.concatenate([drawn.matrix, drawn.offset[:, :, None]], axis=2).astype(np.float32)
    return Parameters(affine=affine, tone=drawn.tone, strength=drawn.strength, padding="zeros")


CROP = Augmentation("crop_flip")
METHODS: dict[str, Method] = {
    "plain": {},
    "alternating": {"augmentation": replace(CROP, flip="alternating")},
    "trivial_augment": {"augmentation": replace(CROP, trivial_augment=True)},
    "rand_augment_5": {"draw": rand_augment, "level": 5},
    "rand_augment_9": {"draw": rand_augment, "level": 9},
    "aug_mix": {"draw": aug_mix, "level": 3},
    "erasing": {"draw": random_erasing, "share": 0.25},
    "cutout_8": {"augmentation": replace(CROP, cutout=8)},
    "mixup": {"augmentation": replace(CROP, mixup=0.2)},
    "mixup_off": {"augmentation": replace(CROP, mixup=0.2), "mix_until": 0.75},
    "cutmix": {"augmentation": replace(CROP, cutmix=1.0)},
    "cutmix_off": {"augmentation": replace(CROP, cutmix=1.0), "mix_until": 0.75},
    "depth_0.1": {"depth": 0.1},
    "depth_0.2": {"depth": 0.2},
    "sam": {"sam": 1},
    "sam_2": {"sam": 2},
    "sam_5": {"sam": 5},
    "muon_0.005": {"muon": 0.005},
    "muon_0.01": {"muon": 0.01},
    "muon_0.02": {"muon": 0.02},
}


def pixels(
    images: npt.NDArray[np.uint8], rows: npt.NDArray[np.int64], drawn: Any, mean: Tensor, std: Tensor
) -> tuple[Tensor, Parameters]:
    """Return augmented images (n, 3, 32, 32) float32 of one batch, and the parameters of the last pass."""
    batch = torch.from_numpy(images[rows]).permute(0, 3, 1, 2).float()
    if isinstance(drawn, list) and isinstance(drawn[0], list):  # AugMix
        chains, weights, share, last = drawn
        mixed = torch.zeros_like(batch)
        for number, chain in enumerate(chains):
            one = batch.clone()
            for operation in chain:
                one = _applied(one, operation.map(lambda array: array[rows]))
            mixed += torch.from_numpy(weights[rows, number]).view(-1, 1, 1, 1) * one
        batch = torch.lerp(batch, mixed, torch.from_numpy(share[rows]).view(-1, 1, 1, 1))
    elif isinstance(drawn, list):  # RandAugment
        *operations, last = drawn
        for operation in operations:
            batch = _applied(batch, operation.map(lambda array: array[rows]))
    else:
        last = drawn
    last = last.map(lambda array: array[rows])
    batch = (_applied(batch, last) / 255.0 - mean) / std
    if last.hole is not None:
        batch.masked_fill_(torch_ops.box_mask(torch.from_numpy(last.hole), batch.shape[-1]), 0.0)
    return batch.contiguous(memory_format=torch.channels_last), last


def _applied(batch: Tensor, parameters: Parameters) -> Tensor:
    size = batch.shape[-1]
    if parameters.tone is not None:
        strength = torch.from_numpy(parameters.strength)
        torch_ops.change_tones(batch, parameters.tone, strength, torch.from_numpy)
    if parameters.affine is None:
        return batch
    affine = parameters.affine
    theta = torch.from_numpy(np.concatenate([affine[:, :, :2], affine[:, :, 2:] * np.float32(2 / size)], axis=2))
    centers = (2.0 * torch.arange(size, dtype=torch.float32) + 1.0) / size - 1.0
    return torch_ops.warp(batch, theta, centers, parameters.padding)


def batches(
    method: Method, images: npt.NDArray[np.uint8], labels: Tensor, epoch: int, epochs: int, seed: int, stats: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield an epoch's batches: images, and labels or probabilities."""
    augmentation = method.get("augmentation", CROP)
    if epoch >= epochs * method.get("mix_until", 1.0):
        augmentation = replace(augmentation, mixup=0.0, cutmix=0.0)
    options = {key: method[key] for key in ("level", "share") if key in method}
    drawn = method.get("draw", augment.draw)(augmentation, seed, epoch, len(images), 32, **options)
    order = np.random.default_rng((seed, epoch)).permutation(len(images))
    for start in range(0, len(order) - BATCH + 1, BATCH):
        rows = order[start : start + BATCH]
        made, last = pixels(images, rows, drawn, *stats)
        targets = labels[torch.from_numpy(rows)]
        if last.blend is not None:
            blend, box, share = (torch.from_numpy(each) for each in (last.blend, last.box, last.label_share))
            shift = BATCH // 2
            targets = torch_ops.mixed_targets(targets, targets.roll(-shift), share, 10)
            made = torch_ops.mix(made, made.roll(-shift, 0), blend, box)
        yield made, targets


def build(method: Method, seed: int) -> nn.Module:
    """Build the network; with stochastic depth each image loses a layer's new maps with a probability that rises."""
    torch.manual_seed(seed)
    block: Literal["reference", "fused"] = "reference" if "depth" in method else "fused"
    model = densenet(
        variant="densenet", growth_rate=16, num_layers=[2, 4, 6], compression=0.5, num_classes=10, block=block
    )
    if "depth" in method:
        layers = [module for module in model.modules() if isinstance(module, DenseLayer)]
        for number, layer in enumerate(layers, start=1):
            layer.append(StochasticDepth(method["depth"] * number / len(layers), "row"))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def build_optimizer_of(method: Method, model: nn.Module) -> tuple[torch.optim.Optimizer, float]:
    """Return the optimizer, and its peak learning rate."""
    if "muon" in method:
        # Its decay is decoupled: lr * weight_decay is that of the others.
        lr, config = method["muon"], OptimizerConfig("muon", momentum=0.95, weight_decay=LR * DECAY / method["muon"])
    else:
        lr, config = LR, OptimizerConfig("sgd", momentum=0.9, weight_decay=DECAY)
    return build_optimizer(model, config, lr), lr


def sharpness_step(model: nn.Module, loss: Callable[[], Tensor], radius: float = 0.05) -> None:
    """Replace the gradients by those at the worst nearby point (SAM, Foret et al. 2021), but not BatchNorm's sums."""
    parameters: list[Tensor] = [p for p in model.parameters() if p.grad is not None]
    norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
    steps = [p.grad * (radius / (norm + 1e-12)) for p in parameters if p.grad is not None]
    kept = [buffer.clone() for buffer in model.buffers()]
    with torch.no_grad():
        torch._foreach_add_(parameters, steps)
    model.zero_grad()
    loss().backward()
    with torch.no_grad():
        torch._foreach_sub_(parameters, steps)
        for buffer, value in zip(model.buffers(), kept, strict=True):
            buffer.copy_(value)


def train(name: str, seed: int, epochs: int, limit: int, data: Any) -> dict[str, Any]:
    """Train and evaluate once."""
    method = METHODS[name]
    images, labels = data.train.images[:limit], torch.from_numpy(np.asarray(data.train.labels[:limit]))
    stats = tuple(torch.tensor(values).view(1, 3, 1, 1) for values in (data.mean, data.std))
    model = build(method, seed)
    average, (optimizer, peak) = WeightAverage(model, 0.995), build_optimizer_of(method, model)
    steps_per_epoch = len(images) // BATCH
    steps, step, started, trained = steps_per_epoch * epochs, 0, time.perf_counter(), 0.0
    for epoch in range(epochs):
        for batch, targets in batches(method, images, labels, epoch, epochs, seed, stats):
            state = ScheduleState(step, 0, steps, steps_per_epoch, peak)
            lr = one_cycle(state, pct_start=0.2, div_factor=25.0, final_div_factor=1e4, anneal="linear")
            for group in optimizer.param_groups:
                group["lr"] = lr

            def loss(batch: Tensor = batch, targets: Tensor = targets) -> Tensor:
                return F.cross_entropy(model(batch), targets)

            value = loss()
            value.backward()
            if method.get("sam") and step % method["sam"] == 0:
                sharpness_step(model, loss)
            optimizer.step()
            model.zero_grad()
            average.update(step)
            step, trained = step + 1, value.item()
        if not math.isfinite(trained):
            break
    seconds = time.perf_counter() - started
    held_out, truth = data.train.images[-HELD_OUT:], torch.from_numpy(np.asarray(data.train.labels[-HELD_OUT:]))
    with torch.inference_mode():
        logits = torch.cat(
            [
                average.model(pixels(held_out, np.arange(start, start + 500), Parameters(), *stats)[0])
                for start in range(0, HELD_OUT, 500)
            ]
        )
    return {
        "method": name,
        "seed": seed,
        "images": limit,
        "epochs": epochs,
        "top1": (logits.argmax(1) == truth).double().mean().item(),
        "loss": F.cross_entropy(logits, truth).item(),
        "train_loss": trained,
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Train what the file does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder of cifar-10-batches-py")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load_dataset("cifar10", arguments.data)
    keys = ("method", "seed", "images", "epochs")
    for seed in arguments.seeds:
        for name in arguments.methods:
            lines = arguments.out.read_text().splitlines() if arguments.out.exists() else []
            wanted = (name, seed, arguments.images, arguments.epochs)
            if any(tuple(json.loads(line)[key] for key in keys) == wanted for line in lines):
                continue
            row = train(name, seed, arguments.epochs, arguments.images, data)
            with open(arguments.out, "a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)


if __name__ == "__main__":
    main()
