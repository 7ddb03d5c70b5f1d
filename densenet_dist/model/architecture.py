"""The architecture of a DenseNet as plain numbers, and checks of their consistency. Does not use PyTorch."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import ceil
from typing import Annotated, Final, Literal

from pydantic import Field, TypeAdapter, ValidationError

_MAX_PARAMETERS: Final = 10**10
"""With gradients and momentum they take 112 GiB."""
# See `Architecture` for their meaning.
Stem = Literal["cifar", "imagenet"]
CompressionOf = Literal["channels", "growth_rate"]
Head = Literal["global", "pool2"]
Init = Literal["glorot", "he", "torchvision"]
BlockForm = Literal["reference", "fused", "auto"]
_Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The architecture of a :class:`densenet_dist.model.densenet.DenseNet`.

    Attributes:
        growth_rate: channels that each layer adds (k).
        num_layers: number of layers of each block; its length is the number of blocks.
        num_classes: number of logits.
        stem_channels: input channels of the first block.
        stem: ``cifar``: conv3x3; ``imagenet``: conv7x7 with stride 2, BN, ReLU, 3x3 max pooling with stride 2.
        bn_size: width of the bottleneck before each 3x3 convolution, in units of k (4 in DenseNet-BC); None: no
            bottleneck.
        compression: output channels of a transition as a fraction of ``compression_of``, rounded down (theta, sec. 3).
        compression_of: ``channels``, the transition's input channels, or ``growth_rate``, as in the notebook.
        drop_rate: probability of dropout after each convolution but the stem's (sec. 4.2: "except the first one").
        norm_momentum: weight of the new batch in the running statistics, as in PyTorch (Keras' momentum is 1 minus it).
        norm_eps: added to the variance in batch normalization.
        head: ``global`` average pooling, or ``pool2``: 2x2 average pooling and a classifier that sees all positions.
        init: initialization of the weights, see :func:`densenet_dist.model.densenet.initialize`.
        image_size: side of the square images in pixels. With ``global``, larger images work too.
        in_channels: channels of the images.
        block: implementation of the dense blocks; all compute the same function from the same weights. ``fused`` and
            ``auto`` fall back to the reference on devices without kernels; training resolves ``auto`` by measuring.
    """

    growth_rate: _Count
    num_layers: Annotated[tuple[_Count, ...], Field(min_length=1)]
    num_classes: _Count
    stem_channels: _Count
    stem: Stem = "cifar"
    bn_size: _Count | None = None
    compression: Annotated[float, Field(gt=0, le=1)] = 1.0
    compression_of: CompressionOf = "channels"
    drop_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    norm_momentum: Annotated[float, Field(ge=0, le=1)] = 0.1
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    head: Head = "global"
    init: Init = "he"
    image_size: _Count = 32
    in_channels: _Count = 3
    block: BlockForm = "reference"

    def block_widths(self) -> list[tuple[int, int]]:
        """Return the input and output channels of each block."""
        widths: list[tuple[int, int]] = []
        entering = self.stem_channels
        for layers in self.num_layers:
            leaving = entering + layers * self.growth_rate
            widths.append((entering, leaving))
            # In binary: 100 * 0.29 is 28. Rounding it as a decimal would change the widths of existing networks.
            entering = int((leaving if self.compression_of == "channels" else self.growth_rate) * self.compression)
        return widths

    def block_sides(self) -> list[int]:
        """Return the height and width of each block's feature maps in pixels; 0 if nothing is left after pooling."""
        # Stride 2 in the stem rounds up, because it pads; the transitions' average pooling rounds down.
        side = (self.image_size + 3) // 4 if self.stem == "imagenet" else self.image_size
        return [side >> i for i in range(len(self.num_layers))]

    def head_features(self) -> int:
        """Return the number of inputs of the classifier."""
        positions = (self.block_sides()[-1] // 2) ** 2 if self.head == "pool2" else 1
        return self.block_widths()[-1][1] * positions

    def num_parameters(self) -> int:
        """Return the number of trainable parameters."""
        widths, k = self.block_widths(), self.growth_rate
        area, norm = (7 * 7, 2) if self.stem == "imagenet" else (3 * 3, 0)
        total = self.stem_channels * (self.in_channels * area + norm)
        narrow = (self.bn_size or 0) * k
        for (entering, _), layers in zip(widths, self.num_layers, strict=True):
            inputs = layers * entering + k * layers * (layers - 1) // 2  # input channels, summed over the layers
            total += inputs * (2 + (narrow or 9 * k)) + layers * narrow * (2 + 9 * k)
        total += sum(leaving * (2 + entering) for (_, leaving), (entering, _) in pairwise(widths))
        return total + 2 * widths[-1][1] + (self.head_features() + 1) * self.num_classes

    def macs(self) -> list[int]:
        """Return the multiply-adds of the forward pass of an image: stem, each block with the transition, classifier.

        Only convolutions and the classifier count.
        """
        widths, sides, k = self.block_widths(), self.block_sides(), self.growth_rate
        area, side = (7 * 7, (self.image_size + 1) // 2) if self.stem == "imagenet" else (3 * 3, self.image_size)
        found = [self.in_channels * self.stem_channels * area * side**2]
        narrow = (self.bn_size or 0) * k
        following = [entering for entering, _ in widths[1:]] + [0]
        for i, layers in enumerate(self.num_layers):
            entering, leaving = widths[i]
            inputs = layers * entering + k * layers * (layers - 1) // 2  # as in `num_parameters`
            weights = inputs * (narrow or 9 * k) + layers * narrow * 9 * k + leaving * following[i]
            found.append(weights * sides[i] ** 2)
        return [*found, self.head_features() * self.num_classes]

    def block_values(self) -> list[int]:
        """Return the number of values of each block's feature maps, per image."""
        return [leaving * side**2 for (_, leaving), side in zip(self.block_widths(), self.block_sides(), strict=True)]

    def problems(self) -> list[str]:
        """Return all reasons why the network cannot be built, one line each: ``model.<key>: problem; remedy``."""
        try:
            _ADAPTER.validate_python(asdict(self))
        except ValidationError as error:  # widths and sides are computed from these values
            return [
                f"model.{'.'.join(map(str, found['loc']))}: {found['msg']}; got {found['input']!r}"
                for found in error.errors()
            ]
        return [*self._width_problems(), *self._side_problems(), *self._size_problems()]

    def _width_problems(self) -> Iterator[str]:
        for i, ((_, leaving), (entering, _)) in enumerate(pairwise(self.block_widths()), start=1):
            if entering < 1:
                base = leaving if self.compression_of == "channels" else self.growth_rate
                yield (
                    f"model.compression: {self.compression} of {base} channels leaves none after block {i}; "
                    f"{ceil(1e4 / base) / 1e4} would leave one"
                )
                return

    def _side_problems(self) -> Iterator[str]:
        smallest = 2 if self.head == "pool2" else 1
        sides = self.block_sides()
        if sides[-1] >= smallest:
            return
        blocks = len(sides)
        needed = smallest << (blocks - 1)
        if self.stem == "imagenet":
            needed = 4 * needed - 3
        fitting = sum(side >= smallest for side in sides)
        fewer = f"use at most {_blocks(fitting)} or " if fitting else "use "
        yield (
            f"model.num_layers: images of {self.image_size}x{self.image_size} are too small for {_blocks(blocks)}: "
            f"{sides[-1]}x{sides[-1]} would remain in the last one, which needs {smallest}x{smallest}; "
            f"{fewer}images of at least {needed}x{needed}"
        )

    def _size_problems(self) -> Iterator[str]:
        if (parameters := self.num_parameters()) > _MAX_PARAMETERS:
            yield (
                f"model.num_layers, model.growth_rate: {parameters:,} parameters ({parameters // 2**28:,} GiB) are too "
                f"many; lower them to {_MAX_PARAMETERS:,} parameters or fewer"
            )


_ADAPTER: Final = TypeAdapter(Architecture)


def _blocks(count: int) -> str:
    return "1 block" if count == 1 else f"{count} blocks"
