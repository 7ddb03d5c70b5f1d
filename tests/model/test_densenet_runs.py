"""The ways a net is run: channels_last memory, autocast, compiled, on a GPU."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densenet_dist.model import DenseNet

Nets = Callable[..., DenseNet]
Images = Callable[..., Tensor]
VARIANTS = ["notebook", "densenet", "densenet_bc", "densenet121"]


def side_of(variant: str) -> int:
    """Give the side of images that leave more than one pixel in the last block: one pixel has no memory format."""
    return 64 if variant == "densenet121" else 32


def watch_memory_format(net: DenseNet) -> list[str]:
    """Note, from now on, every module of the net's features with a 4-D input or output not in channels_last memory."""
    offenders: list[str] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def check(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            if not all(t.is_contiguous(memory_format=torch.channels_last) for t in (*inputs, output)):
                offenders.append(name)

        return check

    for name, module in net.named_modules():
        if name.startswith("features"):
            module.register_forward_hook(hook(name))
    return offenders


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_activations_stay_in_channels_last(
    variant: str, memory_format: torch.memory_format, small: Nets, images: Images
) -> None:
    net = small(variant, drop_rate=0.2).train()
    offenders = watch_memory_format(net)
    net(images(side_of(variant)).contiguous(memory_format=memory_format)).sum().backward()
    assert offenders == []


def test_the_watch_sees_other_memory_formats(small: Nets, images: Images) -> None:
    net = small("notebook").to(memory_format=torch.contiguous_format)
    offenders = watch_memory_format(net)
    net.features(images())
    assert "features.denseblock1.denselayer1" in offenders


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_and_gradients_are_in_channels_last(variant: str, small: Nets, images: Images) -> None:
    """Were a gradient laid out otherwise than its weight, DDP would copy it into its bucket at every step."""
    net = small(variant).train()
    net(images(side_of(variant))).sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None
        assert p.grad.stride() == p.stride(), name
        if p.ndim == 4:
            assert p.is_contiguous(memory_format=torch.channels_last), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_format_of_the_input_does_not_matter(variant: str, small: Nets, images: Images) -> None:
    net, x = small(variant).eval(), images(side_of(variant))
    assert torch.equal(net(x), net(x.contiguous(memory_format=torch.channels_last)))
    assert torch.equal(net(x), net(x.transpose(2, 3).contiguous().transpose(2, 3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["notebook", "densenet_bc"])
def test_autocast(variant: str, dtype: torch.dtype, small: Nets, images: Images) -> None:
    net, x = small(variant).train(), images()
    dtypes: set[torch.dtype] = set()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _m, _i, output: dtypes.add(output.dtype))
    offenders = watch_memory_format(net)
    with torch.autocast("cpu", dtype):
        logits = net(x)
    logits.float().square().sum().backward()

    assert dtypes == {dtype}
    assert logits.dtype == dtype
    assert offenders == []
    exact = small(variant).train()(x)
    assert not torch.equal(logits.float(), exact)
    torch.testing.assert_close(logits.float(), exact, rtol=0, atol=0.05 * exact.abs().max().item())
    for p in net.parameters():
        assert p.grad is not None
        assert p.grad.dtype == torch.float32
        assert p.grad.isfinite().all()


def training_step(net: Callable[[Tensor], Tensor], weights: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Compute logits and gradients with seeded dropout."""
    torch.manual_seed(5)
    logits = net(x)
    F.cross_entropy(logits, torch.tensor([1, 4, 0, 9])).backward()
    return logits.detach(), [p.grad for p in weights.parameters() if p.grad is not None]


def assert_compiled_equals_eager(compiled: DenseNet, eager: DenseNet, x: Tensor, backend: str) -> None:
    """Compile the first net without graph breaks; compare a training step and running statistics with the second's."""
    torch.compiler.reset()
    expected = training_step(eager, eager, x)
    actual = training_step(torch.compile(compiled, fullgraph=True, backend=backend), compiled, x)
    assert len(actual[1]) == len(list(eager.parameters()))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(compiled.named_buffers()), dict(eager.named_buffers()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("variant", "drop_rate"), [("notebook", 0.2), ("densenet_bc", 0.0), ("densenet121", 0.0)])
def test_compiles_into_one_graph(variant: str, drop_rate: float, small: Nets, images: Images) -> None:
    nets = [small(variant, num_layers=[2, 1], drop_rate=drop_rate).train() for _ in range(2)]
    assert_compiled_equals_eager(*nets, images(), "aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # Inductor's own use
def test_inductor_computes_the_same(small: Nets, images: Images) -> None:
    # Without dropout: Inductor draws its masks with a generator of its own.
    nets = [small("notebook", num_layers=[1, 1]).train() for _ in range(2)]
    assert_compiled_equals_eager(*nets, images(), "inductor")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_mixed_precision_on_a_gpu(variant: str, dtype: torch.dtype, small: Nets, images: Images) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    net = small(variant, drop_rate=0.1, image_size=64).cuda().train()
    offenders = watch_memory_format(net)
    with torch.autocast("cuda", dtype):
        logits = net(images(64).cuda())
    logits.float().sum().backward()
    assert logits.dtype == dtype
    assert offenders == []
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)

    net.eval()
    x = images(64).cuda()
    with torch.no_grad(), torch.autocast("cuda", dtype):
        logits = net(x)
    exact = net.cpu().double()(x.cpu().double())
    torch.testing.assert_close(logits.cpu().double(), exact, rtol=0, atol=0.05 * exact.abs().max().item())
