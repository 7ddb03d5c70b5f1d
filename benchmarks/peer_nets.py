"""The nets of benchmarks/peers.py: this project's, torchvision's, timm's, Keras', and what shows them to be the same.

torch, timm and keras are imported where they are used: Keras may run in a Python that has no torch, and the others in
one that has no timm. Whatever cannot be had here is left out with the reason, `LeftOut`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn

NOTEBOOK_PARAMETERS: Final = 3_532_210
"""What Keras counts as trainable in the notebook's net for ten classes."""
TOLERANCE: Final = 1e-9
"""The greatest difference of two nets that are the same, in float64, as a share of a tensor's greatest value."""
CHECK_BATCH: Final = 4
AFTER_CONV0: Final = ("norm0", "relu0", "pool0")
"""What torchvision's and timm's stem does after its convolution; in timm norm0 holds the ReLU."""


FALLS_BACK: Final = "model.block: the reference form is used"
"""How the fused form's warning begins where it has no kernels."""


class LeftOut(Exception):
    """This net cannot be had here; the message says why."""


class DifferentNets(Exception):
    """Two nets that should be the same are not."""


class Net(NamedTuple):
    """One net as this project names it and as the others are asked for it."""

    variant: str
    num_classes: int
    image_size: int
    growth_rate: int
    block_config: tuple[int, ...]
    stem_channels: int
    bn_size: int
    """The peers' bottleneck in units of the growth rate."""
    cifar_stem: bool
    """One 3x3 convolution in the place of the peers' stem."""
    differences: Mapping[str, str]
    """What keeps a library from being the same net; empty where nothing does."""


# Neither has blocks without a bottleneck; with one of 3k maps they multiply about as often as the notebook's net.
NOT_THE_NOTEBOOKS: Final = (
    "1x1 convolutions to 3k maps before the 3x3 ones; transitions to half of the maps, not to k; "
    "global average pooling, not 2x2 pooling with all positions classified; BatchNorm's eps and momentum PyTorch's"
)
NETS: Final[Mapping[str, Net]] = {
    "notebook": Net(
        "notebook",
        num_classes=10,
        image_size=32,
        growth_rate=35,
        block_config=(12, 12, 12, 12),
        stem_channels=35,
        bn_size=3,
        cifar_stem=True,
        differences={"torchvision": NOT_THE_NOTEBOOKS, "timm": f"{NOT_THE_NOTEBOOKS}; a stem of 2k maps, not k"},
    ),
    "bc100": Net(
        "densenet_bc",
        num_classes=10,
        image_size=32,
        growth_rate=12,
        block_config=(16, 16, 16),
        stem_channels=24,
        bn_size=4,
        cifar_stem=True,
        differences={},
    ),
    "densenet121": Net(
        "densenet121",
        num_classes=1000,
        image_size=224,
        growth_rate=32,
        block_config=(6, 12, 24, 16),
        stem_channels=64,
        bn_size=4,
        cifar_stem=False,
        differences={},
    ),
}


def ours(net: Net, form: str = "reference") -> nn.Module:
    """This project's net; `form` is a form of its dense blocks, or `checkpointed`: reference blocks made twice.

    Where a net of the fused form has no kernels, its first step raises its RuntimeWarning instead of measuring another.
    """
    from torch.utils.checkpoint import checkpoint

    from densenet_dist.errors import ConfigError
    from densenet_dist.model.variants import densenet

    warnings.filterwarnings("error", FALLS_BACK, RuntimeWarning)
    block: Any = "reference" if form == "checkpointed" else form
    try:
        model = densenet(net.variant, num_classes=net.num_classes, image_size=net.image_size, block=block)
    except ConfigError as error:
        raise LeftOut(str(error)) from error
    if form == "checkpointed":
        for name, module in model.features.named_children():
            if name.startswith("denseblock"):  # its running statistics move twice a step, as in torchvision's own
                module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    return model


def torchvision_net(net: Net, form: str = "eager") -> nn.Module:
    from torchvision.models import DenseNet

    model = DenseNet(
        growth_rate=net.growth_rate,
        block_config=net.block_config,
        num_init_features=net.stem_channels,
        bn_size=net.bn_size,
        num_classes=net.num_classes,
        memory_efficient=form == "memory_efficient",
    )
    return with_cifar_stem(model) if net.cifar_stem else model


def timm_net(net: Net, form: str = "eager") -> nn.Module:
    try:
        from timm.models.densenet import DenseNet
    except ImportError as error:
        raise LeftOut(f"timm: {error}") from error
    model = DenseNet(  # its stem makes 2k maps, whatever is asked for
        growth_rate=net.growth_rate,
        block_config=net.block_config,
        bn_size=net.bn_size,
        num_classes=net.num_classes,
        memory_efficient=form == "memory_efficient",
    )
    return with_cifar_stem(model) if net.cifar_stem else model


def with_cifar_stem(model: nn.Module) -> nn.Module:
    """Put one 3x3 convolution in the place of the stem for ImageNet: 7x7 with stride 2, BN, ReLU, max pooling."""
    from torch import nn

    features: Any = model.features
    conv = nn.Conv2d(3, features.conv0.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight)
    features.conv0 = conv
    for name in AFTER_CONV0:
        if hasattr(features, name):
            delattr(features, name)
    return model


LIBRARIES: Final[Mapping[str, Callable[..., Any]]] = {"ours": ours, "torchvision": torchvision_net, "timm": timm_net}


def keras_notebook(threads: int) -> Any:
    """The notebook's net as the notebook wrote it, on Keras' own default of (N, H, W, C); logits, not probabilities."""
    try:
        import tensorflow as tf
        from keras import Input, Model, layers
    except ImportError as error:
        raise LeftOut(f"keras: {error}") from error
    tf.config.threading.set_intra_op_parallelism_threads(threads)  # only before the first tensor
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    net = NETS["notebook"]
    conv = partial(layers.Conv2D, padding="same", use_bias=False)

    def norm_relu(x: Any) -> Any:
        return layers.ReLU()(layers.BatchNormalization(momentum=0.99, epsilon=1e-3)(x))

    images = Input((net.image_size, net.image_size, 3))
    x = conv(net.stem_channels, 3)(images)
    for i, num_layers in enumerate(net.block_config):
        if i:
            x = layers.AveragePooling2D(2)(conv(net.growth_rate, 1)(norm_relu(x)))
        for _ in range(num_layers):
            y = layers.Dropout(0.0)(conv(net.growth_rate, 3)(norm_relu(x)))
            x = layers.Concatenate()([x, y])
    x = layers.AveragePooling2D(2)(norm_relu(x))
    model = Model(images, layers.Dense(net.num_classes)(layers.Flatten()(x)))
    parameters = sum(math.prod(weight.shape) for weight in model.trainable_weights)
    if parameters != NOTEBOOK_PARAMETERS:
        raise DifferentNets(f"Keras counts {parameters:,} trainable parameters, not {NOTEBOOK_PARAMETERS:,}")
    return model


def size_of(net: Net, library: str) -> dict[str, int]:
    """Trainable parameters, and multiplications with an addition in convolutions and classifier, forward, an image."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = LIBRARIES[library](net).eval()
        model(torch.empty(1, 3, net.image_size, net.image_size))
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "multiply_adds": counter.get_total_flops() // 2}


def check_same(net: Net, library: str, form: str = "reference", device: str = "cpu") -> dict[str, float]:
    """How far `library`'s net is from this project's with the same weights, in float64 and in training mode.

    Returns:
        The greatest differences of logits, of gradients and of running statistics after the step, each tensor's as a
        share of its greatest value.

    Raises:
        DifferentNets: names or shapes are others, or a difference is more than `TOLERANCE`.
        LeftOut: as for the nets.
    """
    import torch

    torch.manual_seed(0)
    theirs, own = LIBRARIES[library](net), ours(net, form)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.ndim == 1:  # fresh gammas of 1 and betas of 0 would hide an error in them
                p.add_(torch.randn_like(p), alpha=0.2)
    shapes, wanted = ({name: tuple(t.shape) for name, t in model.state_dict().items()} for model in (theirs, own))
    if other := dict(shapes.items() ^ wanted.items()):
        raise DifferentNets(f"{library}'s net and ours differ in {len(other)} tensors, such as {min(other)}")
    own.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(CHECK_BATCH, 3, net.image_size, net.image_size, dtype=torch.float64)
    labels = torch.randint(net.num_classes, (CHECK_BATCH,))
    expected, found = (
        values_of_step(model.to(device, torch.float64).train(), images.to(device), labels.to(device))
        for model in (theirs, own)
    )
    far = {part: farthest(found[part], expected[part]) for part in expected}
    if not max(far.values()) <= TOLERANCE:
        raise DifferentNets(f"{library}'s net and ours ({form}) differ by {far}, more than {TOLERANCE}")
    return far


def values_of_step(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, dict[str, Tensor]]:
    """Everything that a training step computes, by name."""
    from torch.nn import functional as F

    logits = model(images)
    F.cross_entropy(logits, labels).backward()
    return {
        "logits": {"": logits.detach()},
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "statistics": dict(model.named_buffers()),
    }


def farthest(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The greatest difference, NaN where there is one; a tensor without a value other than 0 shows nothing."""
    far = []
    for name, tensor in expected.items():
        greatest = tensor.abs().max().item()
        if greatest == 0:
            raise DifferentNets(f"{name} is 0 everywhere: nothing is compared")
        far.append((found[name] - tensor).abs().max().item() / greatest)
    return math.nan if any(map(math.isnan, far)) else max(far)
