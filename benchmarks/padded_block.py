"""What widths that tensor cores like would bring to the reference form: every layer's maps padded to multiples of 8.

    python benchmarks/padded_block.py configs/cifar10_notebook.yaml cluster.device=cuda train.precision=bf16 \\
        --batch-sizes 256 --out padded.json

Measured as by ``densenet-dist bench model``, beside the variants named.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densenet_dist.bench.model import bench_model, print_model
from densenet_dist.bench.training_step import VARIANTS, Variant
from densenet_dist.cli.options import write_json
from densenet_dist.config import load_config
from densenet_dist.model import DenseNet
from densenet_dist.model.dense_block import DenseBlock

MULTIPLE = 8
"""Channels that bf16 and fp16 convolutions on tensor cores want."""


class PaddedDenseBlock(DenseBlock):
    """The same function as `DenseBlock`, of the same state dict: widths are padded with zeros inside `forward` only.

    Padded weights, gammas and betas are zero, and so are padded maps and all gradients of the padding. Shapes of input
    and output are those of `DenseBlock`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers in order; see the class."""
        columns = torch.arange(x.shape[1], device=x.device)
        x = _pad_maps(x)
        for layer in self.values():
            made, read = x, columns
            for i in range(1, 3 if hasattr(layer, "conv2") else 2):
                norm, conv, drop = (
                    getattr(layer, f"norm{i}"),
                    getattr(layer, f"conv{i}"),
                    getattr(layer, f"drop{i}", None),
                )
                made = F.relu(_norm(made, norm, read), inplace=True)
                weight = _spread(_spread(conv.weight, 1, read, made.shape[1]), 0, *_places(conv.out_channels, x.device))
                made = F.conv2d(made, weight, padding=conv.padding)
                if drop is not None:
                    made = _pad_maps(drop(made[:, : conv.out_channels]))
                read = torch.arange(conv.out_channels, device=x.device)
            columns = torch.cat((columns, x.shape[1] + read))
            x = torch.cat((x, made), dim=1)
        return x.index_select(1, columns).contiguous(memory_format=torch.channels_last)


def _norm(x: Tensor, norm: nn.BatchNorm2d, columns: Tensor) -> Tensor:
    width, mean, var = x.shape[1], norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    wide_mean, wide_var = _spread(mean, 0, columns, width), _spread(var, 0, columns, width)
    gamma, beta = _spread(norm.weight, 0, columns, width), _spread(norm.bias, 0, columns, width)
    y = F.batch_norm(x, wide_mean, wide_var, gamma, beta, norm.training, norm.momentum or 0.0, norm.eps)
    if norm.training:
        with torch.no_grad():
            mean.copy_(wide_mean[columns])
            var.copy_(wide_var[columns])
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
    return y


def _places(channels: int, device: torch.device) -> tuple[Tensor, int]:
    return torch.arange(channels, device=device), _padded(channels)


def _padded(channels: int) -> int:
    return -(-channels // MULTIPLE) * MULTIPLE


def _pad_maps(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, 0, _padded(x.shape[1]) - x.shape[1])).contiguous(memory_format=torch.channels_last)


def _spread(values: Tensor, dim: int, places: Tensor, size: int) -> Tensor:
    """Zeros of `size` along `dim`, with the values at their places."""
    shape = [*values.shape[:dim], size, *values.shape[dim + 1 :]]
    return values.new_zeros(shape).index_copy(dim, places, values)


def pad_blocks(model: DenseNet) -> DenseNet:
    """The same net with its blocks padded."""
    for module in model.modules():
        if type(module) is DenseBlock:
            module.__class__ = PaddedDenseBlock  # the parameters are the same
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="CONFIG | key=value")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=["reference", "compiled_graph", "graph"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[256])
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_intermixed_args(arguments)
    variants = {name: VARIANTS[name] for name in args.variants} | {"padded": Variant("reference", convert=pad_blocks)}
    config = load_config(*args.sources)
    outcome = bench_model(
        config, variants=variants, batch_sizes=args.batch_sizes, seconds=args.seconds, rounds=args.rounds
    )
    print_model(outcome)
    write_json(outcome, args.out)


if __name__ == "__main__":
    main()
