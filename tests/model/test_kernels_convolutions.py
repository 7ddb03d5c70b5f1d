"""BN-ReLU and a convolution in C++, compared with PyTorch operators in float64."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from kernel_cases import Draw, Untouched, close, double, keep_away_from_zero
from torch import Tensor
from torch.nn import functional as F

from densenet_dist.model.fused import convolutions
from densenet_dist.model.kernels import build
from densenet_dist.model.kernels.interface import Consumer, Dropout, Kernels, Norm, NormGrad, Statistics
from densenet_dist.model.kernels.native import NativeKernels

# Kernels work on chunks of 128 pixels (3x3: 16 or 32 tiles of 4 x 4 pixels), threads on 256 pixels or more (3x3: whole
# images), products on three vectors of 2 to 16 values. These shapes have all kinds of remainders.
CASES = [
    ((1, 1, 1, 1), 1, 1),
    ((1, 130, 1, 1), 17, 1),
    ((6, 12, 7, 3), 48, 1),  # 126 pixels
    ((8, 48, 4, 4), 12, 1),  # 128
    ((3, 17, 5, 13), 16, 1),
    ((2, 1, 7, 5), 130, 1),
    ((2, 130, 7, 5), 1, 1),
    ((2, 75, 5, 13), 12, 1),
    ((5, 130, 16, 14), 49, 1),  # 1120
    ((17, 3, 65, 61), 8, 1),  # 67,405: more than 64 times 1024
    ((1, 1, 1, 1), 1, 3),
    ((40, 16, 3, 3), 4, 3),  # several images of one thread
    ((3, 48, 32, 32), 12, 3),
    ((2, 35, 16, 16), 35, 3),
    ((2, 20, 5, 7), 49, 3),
    ((2, 130, 23, 9), 17, 3),
    ((65, 1, 1, 2045), 2, 3),  # two images of one thread, one after the other
]
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-13}  # of sums of up to 67,405 terms
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
each_side = pytest.mark.parametrize("side", [1, 3])


@pytest.fixture(scope="module", params=["native", "haswell", "x86-64"])
def native(request: pytest.FixtureRequest) -> NativeKernels:
    """The kernels for this processor, and on x86 those for AVX2 and for SSE2: vectors of 8 and 4 float32."""
    if request.param != "native" and "avx2" not in build._processor():
        pytest.skip("not a processor with AVX2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXXFLAGS", f"-march={request.param}")
        return NativeKernels(build.native_library.__wrapped__())


class Layer(NamedTuple):
    maps: Tensor
    norm: Norm
    weight: Tensor
    dropout: Dropout
    d_made: Tensor
    accumulator: Tensor

    @classmethod
    def draw(cls, shape: tuple[int, int, int, int], makes: int, side: int, dtype: torch.dtype) -> "Layer":
        draw = Draw("cpu", dtype)
        n, c, h, w = shape
        norm, maps = draw.norm(c), draw.maps(*shape, before=3, after=4)
        keep_away_from_zero(maps, [norm])
        d_made, accumulator = draw.maps(n, makes, h, w, before=1), draw.maps(*shape, after=5)
        return cls(maps, norm, draw.normal(makes, c, side, side), draw.dropout(n, makes, h, w), d_made, accumulator)


def rectify_exactly(maps: Tensor, norm: Norm) -> Tensor:
    """Return relu(norm(maps)) in float64."""
    rectified = torch.empty(maps.shape, dtype=torch.float64)
    Kernels().bn_relu(maps.double(), double(norm), rectified)
    return rectified


@each_dtype
@pytest.mark.parametrize("masked", [False, True], ids=["all kept", "masked"])
def test_forward_equals_float64(native: NativeKernels, dtype: torch.dtype, masked: bool) -> None:
    for shape, makes, side in CASES:
        layer, (n, _, h, w) = Layer.draw(shape, makes, side, dtype), shape
        dropout = layer.dropout if masked else None
        slot = Draw("cpu", dtype).maps(n, makes, h, w, before=2, after=3)
        rest, (mean, var) = Untouched(slot), torch.full((2, makes), math.nan, dtype=dtype)
        expected = F.conv2d(rectify_exactly(layer.maps, layer.norm), layer.weight.double(), padding=side // 2)
        Kernels().store_output(expected, dropout, expected, None)

        native.convolve(layer.maps, layer.norm, layer.weight, dropout, slot, Statistics(mean, var))

        close(slot, expected, TOLERANCE[dtype], label=(shape, makes, side))
        stored = slot.double()  # statistics are those of the stored, rounded values
        close(mean, stored.mean((0, 2, 3)), TOLERANCE[dtype], label=(shape, makes, side))
        close(var, stored.var((0, 2, 3), correction=0), TOLERANCE[dtype], label=(shape, makes, side))
        rest.check()


@each_dtype
@pytest.mark.parametrize("carried", ["nothing", "accumulator", "accumulator into itself"])
def test_backward_equals_float64(native: NativeKernels, dtype: torch.dtype, carried: str) -> None:
    for shape, makes, side in CASES:
        maps, norm, weight, _, d_made, accumulator = Layer.draw(shape, makes, side, dtype)
        out = (
            accumulator if carried == "accumulator into itself" else Draw("cpu", dtype).maps(*shape, before=2, after=3)
        )
        before = None if carried == "nothing" else accumulator
        rest, sums = Untouched(out), torch.full((2, shape[1]), math.nan, dtype=dtype)
        d_weight = torch.full(weight.shape, math.nan, dtype=dtype)
        expected, expected_sums = torch.empty(shape, dtype=torch.float64), torch.empty(2, shape[1], dtype=torch.float64)
        came = F.conv_transpose2d(d_made.double(), weight.double(), padding=side // 2)
        exact = None if before is None else before.double()
        consumers = [Consumer(came, NormGrad(double(norm), expected_sums, None))]
        Kernels().sum_gradients(maps.double(), consumers, exact, expected)
        rectified, wanted = rectify_exactly(maps, norm), weight.double().requires_grad_()
        F.conv2d(rectified, wanted, padding=side // 2).backward(d_made.double())
        assert wanted.grad is not None

        native.convolve_backward(maps, NormGrad(norm, sums, None), weight, d_made, before, out, d_weight)

        close(out, expected, TOLERANCE[dtype], label=(shape, makes, side))
        close(sums, expected_sums, TOLERANCE[dtype], label=(shape, makes, side))
        close(d_weight, wanted.grad, TOLERANCE[dtype], label=(shape, makes, side))
        rest.check()


@each_dtype
@each_side
def test_relu_signs_equal_those_of_bn_relu(native: NativeKernels, dtype: torch.dtype, side: int) -> None:
    """Also close to 0: if the sign differed by rounding, the gradient would be of another function."""
    draw = Draw("cpu", dtype)
    norm = draw.norm(35)
    norm.mean[::2] = norm.beta[::2] = 0
    near = draw.maps(4, 35, 9, 7).double() * {torch.float64: 1e-15, torch.float32: 3e-7}[dtype]
    maps = draw.maps(4, 35, 9, 7).copy_(near + (norm.mean - norm.beta / norm.scale())[:, None, None])
    maps[0, ::2] = 0
    rectified, slot, total = (torch.empty_like(maps) for _ in range(3))
    native.bn_relu(maps, norm, rectified)

    identity, sums = torch.eye(35, dtype=dtype)[:, :, None, None], draw.normal(2, 35)
    identity = F.pad(identity, [side // 2] * 4)
    native.convolve(maps, norm, identity, None, slot, None)
    assert side == 3 or torch.equal(slot, rectified)  # the 3x3 convolution rounds

    native.convolve_backward(maps, NormGrad(norm, sums, None), identity, torch.ones_like(maps), None, total, None)
    assert torch.equal(rectified > 0, total != 0)
    close(sums[0], (rectified > 0).double().sum((0, 2, 3)), 1e-15 if side == 1 else TOLERANCE[dtype])
    assert (total[0, ::2] == 0).all()  # no gradient where y is 0
    assert 0.1 < (rectified[1:] > 0).double().mean() < 0.9


@each_side
@pytest.mark.parametrize("where", ["maps", "weight", "d_made", "accumulator"])
def test_nan_reaches_the_same_tensors_as_through_a_convolution(native: NativeKernels, where: str, side: int) -> None:
    for row in (0, 1080, 1124):  # of 1125; the last chunk reuses memory
        layer = Layer.draw((5, 17, 15, 15), 9, side, torch.float32)
        layer.weight[4, 5] = 0  # times NaN is NaN
        image, pixel = divmod(row, 225)
        if where == "weight":
            layer.weight[4, 5] = math.nan
        else:
            getattr(layer, where)[image, 4 if where == "d_made" else 5, pixel // 15, pixel % 15] = math.nan
        maps, norm, weight, dropout, d_made, accumulator = layer
        slot, out, d_weight = torch.empty_like(d_made), torch.empty_like(maps), torch.empty_like(weight)
        (mean, var), sums = weight.new_empty(2, len(weight)), weight.new_empty(2, maps.shape[1])
        native.convolve(maps, norm, weight, dropout, slot, Statistics(mean, var))
        native.convolve_backward(maps, NormGrad(norm, sums, None), weight, d_made, accumulator, out, d_weight)
        # As in PyTorch, the gradient passes where y is NaN.
        assert [int(tensor.isnan().any()) for tensor in (slot, mean, var, out, sums, d_weight)] == {
            "maps": [1, 1, 1, 0, 1, 1],
            "weight": [1, 1, 1, 1, 1, 0],
            "d_made": [0, 0, 0, 1, 1, 1],
            "accumulator": [0, 0, 0, 1, 0, 0],
        }[where]


def test_the_faster_convolutions_are_chosen_once_per_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, measured = NativeKernels(), convolutions._time_layer
    monkeypatch.setenv("DENSENET_DIST_CACHE", str(tmp_path))
    assert all(seconds > 0 for side in (1, 3) for seconds in measured(kernels, side))
    monkeypatch.setattr(convolutions, "_time_layer", lambda _, side: (2.0, 1.0) if side == 1 else (1.0, 2.0))
    choose = convolutions.faster_native_sizes.__wrapped__  # without the process-wide cache
    assert choose(kernels, 1) == {3}
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text()) == {"1": "onednn", "3": "own", "1_ms": [2000, 1000], "3_ms": [1000, 2000]}
    monkeypatch.setattr(convolutions, "_time_layer", lambda *_: (1.0, 2.0))
    assert choose(kernels, 1) == {3}
    assert choose(kernels, 2) == {1, 3}  # another number of threads
    file.write_text('{"1": "own"')
    assert choose(kernels, 1) == {1, 3}
    monkeypatch.setattr(convolutions, "_time_layer", lambda *_: (2.0, 1.0))
    monkeypatch.setenv("DENSENET_DIST_CACHE", str(file / "none"))  # it cannot be written: no measurement counts
    assert choose(kernels, 1) == {1, 3}
