"""BN-ReLU with a 1x1 convolution in C++ against PyTorch's operators, which compute here in float64."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from kernel_cases import Draw, Untouched, close, double, keep_away_from_zero
from torch import Tensor
from torch.nn import functional as F

from densenet_dist.model.kernels.interface import Consumer, Kernels, Norm
from densenet_dist.model.kernels.native import NativeKernels

# The kernels take 64 rows (pixels) at a time, one thread 1024 or more of them; columns in tiles of three vectors, which
# hold 2 to 16 numbers: all the remainders.
CASES = [
    ((1, 1, 1, 1), 1),
    ((1, 130, 1, 1), 17),
    ((3, 12, 7, 3), 48),  # 63 rows
    ((4, 48, 4, 4), 12),  # 64
    ((1, 17, 5, 13), 16),  # 65
    ((2, 1, 7, 5), 130),
    ((2, 130, 7, 5), 1),
    ((2, 49, 5, 13), 48),
    ((2, 75, 5, 13), 12),
    ((5, 130, 16, 14), 49),  # 1120
    ((17, 3, 65, 61), 8),  # 67,405: more than 64 times 1024
]
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-13}  # of sums of up to 67,405 terms
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture(scope="module")
def native() -> NativeKernels:
    return NativeKernels()


class Layer(NamedTuple):
    maps: Tensor
    norm: Norm
    weight: Tensor
    mask: Tensor
    d_made: Tensor
    carry: Tensor

    @classmethod
    def draw(cls, shape: tuple[int, int, int, int], makes: int, dtype: torch.dtype) -> "Layer":
        draw = Draw("cpu", dtype)
        n, c, h, w = shape
        norm, maps = draw.norm(c), draw.maps(*shape, before=3, after=4)
        keep_away_from_zero(maps, [norm])
        d_made, carry = draw.maps(n, makes, h, w, before=1), draw.maps(*shape, after=5)
        return cls(maps, norm, draw.normal(makes, c, 1, 1), draw.mask(n, makes, h, w), d_made, carry)


def rectify_exactly(maps: Tensor, norm: Norm) -> Tensor:
    """relu(norm(maps)) in float64."""
    rectified = torch.empty(maps.shape, dtype=torch.float64)
    Kernels().bn_relu(maps.double(), double(norm), rectified)
    return rectified


@each_dtype
@pytest.mark.parametrize("masked", [False, True], ids=["all kept", "masked"])
def test_forward_equals_float64(native: NativeKernels, dtype: torch.dtype, masked: bool) -> None:
    for shape, makes in CASES:
        layer, (n, _, h, w) = Layer.draw(shape, makes, dtype), shape
        mask = layer.mask if masked else None
        slot = Draw("cpu", dtype).maps(n, makes, h, w, before=2, after=3)
        rest, (mean, var) = Untouched(slot), torch.full((2, makes), math.nan, dtype=dtype)
        expected = F.conv2d(rectify_exactly(layer.maps, layer.norm), layer.weight.double())
        Kernels().write(expected, mask, 0.7, expected, None, None)

        native.conv1x1(layer.maps, layer.norm, layer.weight, mask, 0.7, slot, mean, var)

        close(slot, expected, TOLERANCE[dtype], label=shape)
        stored = slot.double()  # statistics are of what was stored, rounding included
        close(mean, stored.mean((0, 2, 3)), TOLERANCE[dtype], label=shape)
        close(var, stored.var((0, 2, 3), correction=0), TOLERANCE[dtype], label=shape)
        rest.check()


@each_dtype
@pytest.mark.parametrize("carried", ["nothing", "carry", "carry into itself"])
def test_backward_equals_float64(native: NativeKernels, dtype: torch.dtype, carried: str) -> None:
    for shape, makes in CASES:
        maps, norm, weight, _, d_made, carry = Layer.draw(shape, makes, dtype)
        out = carry if carried == "carry into itself" else Draw("cpu", dtype).maps(*shape, before=2, after=3)
        before = None if carried == "nothing" else carry
        rest, sums = Untouched(out), torch.full((2, shape[1]), math.nan, dtype=dtype)
        d_weight = torch.full(weight.shape, math.nan, dtype=dtype)
        expected, expected_sums = torch.empty(shape, dtype=torch.float64), torch.empty(2, shape[1], dtype=torch.float64)
        came = F.conv_transpose2d(d_made.double(), weight.double())
        exact = None if before is None else before.double()
        Kernels().gather(maps.double(), [Consumer(came, double(norm), expected_sums)], exact, expected)
        expected_weight = torch.einsum("nkhw,nchw->kc", d_made.double(), rectify_exactly(maps, norm))

        native.conv1x1_backward(maps, norm, weight, d_made, before, out, sums, d_weight)

        close(out, expected, TOLERANCE[dtype], label=shape)
        close(sums, expected_sums, TOLERANCE[dtype], label=shape)
        close(d_weight[:, :, 0, 0], expected_weight, TOLERANCE[dtype], label=shape)
        rest.check()


@each_dtype
def test_both_rectify_as_bn_relu_does(native: NativeKernels, dtype: torch.dtype) -> None:
    """However close to 0: one rounding apart, and the gradient would be of another function."""
    draw = Draw("cpu", dtype)
    norm = draw.norm(35)
    norm.mean[::2] = norm.beta[::2] = 0
    near = draw.maps(4, 35, 9, 7).double() * {torch.float64: 1e-15, torch.float32: 3e-7}[dtype]
    maps = draw.maps(4, 35, 9, 7).copy_(near + (norm.mean - norm.beta / norm.scale())[:, None, None])
    maps[0, ::2] = 0
    rectified, slot, total = (torch.empty_like(maps) for _ in range(3))
    native.bn_relu(maps, norm, rectified)

    identity, sums = torch.eye(35, dtype=dtype)[:, :, None, None], draw.normal(2, 35)
    native.conv1x1(maps, norm, identity, None, 1.0, slot, None, None)
    assert torch.equal(slot, rectified)

    native.conv1x1_backward(maps, norm, identity, torch.ones_like(maps), None, total, sums, None)
    assert torch.equal(rectified > 0, total != 0)
    assert torch.equal(sums[0].double(), (rectified > 0).double().sum((0, 2, 3)))
    assert (total[0, ::2] == 0).all()  # where y is 0 nothing passes
    assert 0.1 < (rectified[1:] > 0).double().mean() < 0.9


def all_at_once(native: NativeKernels, layer: Layer) -> list[Tensor]:
    """Slot, mean, variance, out, sums, and the weight's gradient."""
    maps, norm, weight, mask, d_made, carry = layer
    slot, out, d_weight = torch.empty_like(d_made), torch.empty_like(maps), torch.empty_like(weight)
    mean, var, sums = weight.new_empty(len(weight)), weight.new_empty(len(weight)), weight.new_empty(2, maps.shape[1])
    native.conv1x1(maps, norm, weight, mask, 0.7, slot, mean, var)
    native.conv1x1_backward(maps, norm, weight, d_made, carry, out, sums, d_weight)
    return [slot, mean, var, out, sums, d_weight]


@pytest.mark.parametrize("where", ["maps", "weight", "d_made", "carry"])
def test_nan_reaches_what_a_convolution_lets_it_reach(native: NativeKernels, where: str) -> None:
    for row in (0, 1080, 1124):  # of 1125: the last 37 follow 64 in the same memory, as 1080 is
        layer = Layer.draw((5, 17, 15, 15), 9, torch.float32)
        layer.weight[4, 5] = 0  # times NaN is NaN
        image, pixel = divmod(row, 225)
        if where == "weight":
            layer.weight[4, 5] = math.nan
        else:
            getattr(layer, where)[image, 4 if where == "d_made" else 5, pixel // 15, pixel % 15] = math.nan
        # In slot, mean, var, out, sums and the weight's gradient. What came back passes where y is NaN, as in PyTorch.
        assert [int(tensor.isnan().any()) for tensor in all_at_once(native, layer)] == {
            "maps": [1, 1, 1, 0, 1, 1],
            "weight": [1, 1, 1, 1, 1, 0],
            "d_made": [0, 0, 0, 1, 1, 1],
            "carry": [0, 0, 0, 1, 0, 0],
        }[where]


@each_dtype
def test_the_same_bits_with_any_number_of_threads(native: NativeKernels, dtype: torch.dtype) -> None:
    for shape, makes in (((3, 49, 33, 31), 12), CASES[-1]):
        found, layer = [], Layer.draw(shape, makes, dtype)
        for number in (1, 2, 3, 1):
            torch.set_num_threads(number)
            found.append(all_at_once(native, layer))
        for other in found[1:]:
            for one, tensor in zip(found[0], other, strict=True):
                assert torch.equal(one, tensor)


def test_of_no_pixels_all_is_zero_and_inputs_are_left_alone(native: NativeKernels) -> None:
    _, *found = all_at_once(native, Layer.draw((0, 12, 4, 3), 5, torch.float32))
    assert all((tensor == 0).all() for tensor in found)
    layer, before = (Layer.draw((2, 12, 7, 5), 17, torch.float32) for _ in range(2))
    all_at_once(native, layer)
    for one, other in zip((*layer.norm[:4], *layer[2:]), (*before.norm[:4], *before[2:]), strict=True):
        assert torch.equal(one, other)


def spoil(name: str, tensor: Tensor) -> list[Tensor]:
    """The same of another type, shape or layout."""
    other_type = [] if tensor.dtype == torch.bool else [tensor.double()]
    if name == "mean":
        return [*other_type, tensor[:-1].clone()]
    if name in ("weight", "sums", "d_weight"):
        return [*other_type, tensor[:-1].clone(), tensor.transpose(0, 1).contiguous().transpose(0, 1)]
    return [*other_type, tensor.contiguous(), tensor[:, :, :-1].contiguous(memory_format=torch.channels_last)]


def test_what_cannot_be_read_is_refused(native: NativeKernels) -> None:
    """Pointers go to code that trusts them."""
    maps, norm, weight, mask, d_made, carry = Layer.draw((2, 6, 4, 3), 5, torch.float32)
    shared: dict[str, Any] = {"maps": maps, "norm": norm, "weight": weight}
    forward = {"mask": mask, "keep": 0.7, "slot": d_made.clone(), "mean": torch.empty(5), "var": torch.empty(5)}
    backward = {"d_made": d_made, "carry": carry, "out": carry.clone(), "sums": torch.empty(2, 6)}
    backward["d_weight"] = torch.empty_like(weight)
    for function, given in ((native.conv1x1, shared | forward), (native.conv1x1_backward, shared | backward)):
        function(**given)
        for name in given.keys() - {"norm", "keep", "var"}:
            for wrong in spoil(name, given[name]):
                with pytest.raises(AssertionError):
                    function(**{**given, name: wrong})
