"""The fused convolutions as Triton kernels: against torch.nn.functional in float64, on a GPU or in the interpreter."""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from triton_cases import (
    DEVICES,
    DTYPES,
    INTERPRETED,
    TOLERANCE,
    Draw,
    Untouched,
    check_statistics,
    close,
    double,
    run_interpreted,
)

from densenet_dist.model.kernels.eager import EagerKernels
from densenet_dist.model.kernels.interface import Consumer, Norm

EAGER = EagerKernels()
Case = tuple[tuple[int, int, int, int], int, int, tuple[int, int], int]

# The shape of the maps read, the maps made, the window's side, the channels that the maps' buffer has before and after,
# and those that the gradient of what is made has beyond it.
CASES: list[Case] = [
    ((2, 35, 3, 5), 35, 3, (0, 45), 5),
    ((2, 24, 3, 6), 12, 3, (8, 16), 0),
    ((3, 40, 5, 5), 48, 1, (0, 0), 0),
    ((1, 1, 1, 1), 1, 3, (1, 1), 0),
    ((1, 5, 1, 9), 40, 3, (3, 0), 8),
    ((5, 70, 2, 2), 130, 1, (1, 0), 6),
    ((1, 3, 9, 11), 16, 3, (0, 0), 16),
]
if not INTERPRETED:
    CASES += [((64, 120, 32, 32), 40, 3, (0, 360), 0), ((9, 385, 33, 31), 35, 3, (0, 35), 5)]
    CASES += [((7, 300, 15, 17), 160, 1, (5, 0), 0)]

# All in the types that nets are trained in; of the others the first three.
every_case = pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case}-{dtype}".replace(" ", ""))
        for dtype in DTYPES
        for case in (CASES if dtype in (torch.float32, torch.bfloat16) else CASES[:3])
    ],
)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def conv() -> ModuleType:
    pytest.importorskip("triton")
    from densenet_dist.model.kernels import triton_conv

    return triton_conv


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="starts what runs now")
def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(__file__)


class Layer:
    """What a layer reads and its weight, and the same layer in float64 as PyTorch's operators compute it."""

    def __init__(self, draw: Draw, case: Case) -> None:
        shape, made, side, (before, after), padding = case
        n, c, h, w = shape
        self.maps, self.norm = draw.maps(*shape, before=before, after=after), draw.norm(c)
        weight = draw.normal(made, c, side, side) / (c**0.5 * side)
        # Representable in the maps' type, so that packing it rounds nothing; in PyTorch's two memory formats.
        self.weight = weight.to(draw.dtype).to(draw.wide)
        if side == 3:
            self.weight = self.weight.contiguous(memory_format=torch.channels_last)
        self.d_out = draw.maps(n, made + padding, h, w)
        self.d_out[:, made:] = 0

        exact = torch.empty(shape, dtype=torch.float64, device=self.maps.device)
        EAGER.bn_relu(self.maps.double(), double(self.norm), exact)
        # What the tensor cores multiply is rounded to the maps' type.
        read, kernel = exact.to(draw.dtype).double().requires_grad_(), self.weight.double().requires_grad_()
        self.made = F.conv2d(read, kernel, padding=side // 2)
        gradients = torch.autograd.grad(self.made, (read, kernel), self.d_out[:, :made].double())
        self.d_read, self.d_weight = gradients
        self.made = self.made.detach()


def tolerance(dtype: torch.dtype) -> float:
    """Factors lie at either side of a rounding to the maps' type now and then, one in a sum of many.

    Float32 sums are longer on a GPU.
    """
    return {torch.float32: 3e-6 if INTERPRETED else 1e-5, torch.float64: 1e-14}.get(dtype, 2 * TOLERANCE[dtype])


@every_case
@pytest.mark.parametrize("dropout", [False, True])
def test_forward(conv: ModuleType, device: str, dropout: bool, case: Case, dtype: torch.dtype) -> None:
    shape, made, *_ = case
    n, _, h, w = shape
    draw = Draw(device, dtype)
    layer, mask = Layer(draw, case), draw.mask(n, made, h, w, keep=0.8) if dropout else None
    slot, mean, var = draw.maps(n, made, h, w, before=8, after=5), draw.normal(made), draw.normal(made)
    rest = Untouched(slot)

    conv.conv_forward(layer.maps, layer.norm, layer.weight, mask, 0.8, slot, mean, var)

    close(slot, layer.made if mask is None else layer.made * mask / 0.8, tolerance(dtype))
    check_statistics(slot, mean, var)
    rest.check()


@every_case
@pytest.mark.parametrize("carried", ["maps", "in place"])
def test_dgrad(conv: ModuleType, device: str, carried: str, case: Case, dtype: torch.dtype) -> None:
    shape, c = case[0], case[0][1]
    draw = Draw(device, dtype)
    layer, out = Layer(draw, case), draw.maps(*shape, before=3, after=6, dtype=None if carried == "maps" else draw.wide)
    carry = out if carried == "in place" else draw.maps(*shape)
    sums, wanted = draw.normal(2, c + 7)[:, 5 : 5 + c], torch.empty(2, c, device=device, dtype=torch.float64)
    rest, expected = Untouched(out), torch.empty(shape, device=device, dtype=torch.float64)
    consumer = Consumer(layer.d_read, double(layer.norm), wanted)
    EAGER.gather(layer.maps.double(), [consumer], carry.double(), expected)

    conv.conv_dgrad(layer.d_out, layer.weight, layer.maps, layer.norm, carry, out, sums)

    close(out, expected, max(TOLERANCE[out.dtype], TOLERANCE[draw.wide]))
    close(sums, wanted, 1e-13 if draw.wide == torch.float64 else 5e-6)
    rest.check()


def test_dgrad_without_carry(conv: ModuleType, device: str) -> None:
    layer = Layer(Draw(device), CASES[1])
    found = []
    for carry in (None, torch.zeros_like(layer.maps)):
        found.append(torch.full_like(layer.maps, torch.nan))
        sums = torch.zeros_like(layer.norm.mean).repeat(2, 1)
        conv.conv_dgrad(layer.d_out, layer.weight, layer.maps, layer.norm, carry, found[-1], sums)
    assert torch.equal(*found)


@every_case
def test_wgrad(conv: ModuleType, device: str, case: Case, dtype: torch.dtype) -> None:
    layer = Layer(Draw(device, dtype), case)
    memory_format = torch.channels_last if dtype == torch.bfloat16 else torch.contiguous_format
    found = torch.full_like(layer.weight, torch.nan, memory_format=memory_format)

    conv.conv_wgrad(layer.maps, layer.norm, layer.d_out, found)

    close(found, layer.d_weight, tolerance(dtype))


def test_wgrad_in_parts(conv: ModuleType, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs share the pixels: so many that some have one block of them, and the last has part of one."""
    monkeypatch.setattr(conv, "_WGRAD_PROGRAMS", 1000)
    layer = Layer(Draw(device), ((1, 6, 11, 13), 5, 3, (0, 0), 0))
    found = torch.empty_like(layer.weight)
    conv.conv_wgrad(layer.maps, layer.norm, layer.d_out, found)
    close(found, layer.d_weight, 3e-6)


def test_packed_once(conv: ModuleType, device: str) -> None:
    """What is packed serves forward and backward, and gives the same bits as packing each time."""
    draw = Draw(device, torch.bfloat16)
    layer = Layer(draw, CASES[1])
    weight, norm = conv.pack_weight(layer.weight, torch.bfloat16), conv.pack_norm(layer.norm)
    found: list[list[Tensor]] = []
    for w, n in ((layer.weight, layer.norm), (weight, norm), (weight, norm)):
        slot, out = torch.zeros_like(layer.d_out), torch.zeros_like(layer.maps)
        sums, gradient = torch.zeros_like(layer.norm.mean).repeat(2, 1), torch.zeros_like(layer.weight)
        conv.conv_forward(layer.maps, n, w, None, 1.0, slot, None, None)
        conv.conv_dgrad(layer.d_out, w, layer.maps, n, None, out, sums)
        conv.conv_wgrad(layer.maps, n, layer.d_out, gradient)
        found.append([slot, out, sums, gradient])
    assert all(torch.equal(one, other) for again in found[1:] for one, other in zip(found[0], again, strict=True))


def test_forward_and_backward_agree_on_the_mask(conv: ModuleType, device: str) -> None:
    """Also where norm(x) is but rounding errors. The window is 1x1 and the weight 1: both show relu(norm(x)) > 0."""
    draw = Draw(device)
    x = draw.maps(2, 1, 9, 9)
    gamma, _, mean, var, eps = draw.norm(1)
    near = x[0, :, 0, 0].clone()
    x[0] = near
    norm = Norm(gamma, -(near - mean) * gamma * torch.rsqrt(var + eps), mean, var, eps)
    one, out, back = torch.ones(1, 1, 1, 1, device=device), torch.empty_like(x), torch.empty_like(x)
    conv.conv_forward(x, norm, one, None, 1.0, out, None, None)
    conv.conv_dgrad(torch.ones_like(x), one, x, norm, None, back, draw.normal(2, 1))
    assert torch.equal(out > 0, back != 0)
    assert out[0].max() < 1e-5


def test_nan_reaches_its_window(conv: ModuleType, device: str) -> None:
    layer = Layer(Draw(device), ((1, 20, 6, 7), 12, 3, (0, 12), 0))
    layer.maps[0, 3, 2, 4] = torch.nan
    layer.d_out[0, 2, 5, 6] = torch.nan
    near = torch.zeros(1, 12, 6, 7, dtype=torch.bool, device=device)
    near[:, :, 1:4, 3:6] = True
    slot, out = torch.empty_like(layer.d_out), torch.empty_like(layer.maps)
    conv.conv_forward(layer.maps, layer.norm, layer.weight, None, 1.0, slot, None, None)
    assert torch.equal(slot.isnan(), near)

    conv.conv_dgrad(layer.d_out, layer.weight, layer.maps, layer.norm, None, out, layer.norm.mean.repeat(2, 1))
    passes = torch.empty_like(layer.maps)
    EAGER.bn_relu(layer.maps, layer.norm, passes)
    passes[:, :, :4] = 0
    passes[:, :, :, :5] = 0
    assert torch.equal(out.isnan(), passes > 0)


def test_slot_beside_the_maps_that_are_read(conv: ModuleType, device: str) -> None:
    """As in a block's buffer, where reading runs on into the channels that are being written."""
    draw = Draw(device, torch.bfloat16)
    buffer = draw.maps(2, 40, 9, 9)
    layer = Layer(draw, ((2, 13, 9, 9), 27, 3, (0, 0), 0))
    buffer[:, :13] = layer.maps
    buffer[:, 13:] = torch.nan
    conv.conv_forward(buffer[:, :13], layer.norm, layer.weight, None, 1.0, buffer[:, 13:], None, None)
    close(buffer[:, 13:], layer.made, tolerance(torch.bfloat16))
    assert torch.equal(buffer[:, :13], layer.maps)


def test_refuses_what_does_not_fit(conv: ModuleType) -> None:
    layer = Layer(Draw("cpu"), ((2, 6, 4, 3), 5, 3, (0, 0), 0))
    maps, norm, weight, out = layer.maps, layer.norm, layer.weight, layer.d_out
    with pytest.raises(ValueError, match="1x1 or 3x3"):
        conv.pack_weight(weight[:, :, :2], torch.float32)
    with pytest.raises(ValueError, match="does not go with"):
        conv.conv_forward(maps, norm, conv.PackedWeight(weight, 5, 7, 3), None, 1.0, out, None, None)
    with pytest.raises(ValueError, match="is no gradient"):
        conv.conv_wgrad(maps, conv.PackedNorm(norm.mean.repeat(3, 1), 6), out, weight.double())
    with pytest.raises(ValueError, match="6 channels"):
        conv.conv_wgrad(maps, norm.narrow(0, 5), out, weight)
    with pytest.raises(ValueError, match="does not fill"):
        conv.conv_forward(
            maps,
            conv.PackedNorm(norm.mean.repeat(3, 1), 6),
            conv.PackedWeight(weight, 4, 6, 3),
            None,
            1.0,
            out,
            None,
            None,
        )
