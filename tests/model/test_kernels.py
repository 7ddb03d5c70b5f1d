"""The four passes in C++ against the same passes in PyTorch's operators, which compute here in float64."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from maps import SUMMING, Draw, assert_stored, away_from_zero, double, exact, threads
from torch import Tensor

from densenet_dist.model.kernels.eager import EagerKernels
from densenet_dist.model.kernels.interface import MOST_CONSUMERS, Consumer, accumulation_type
from densenet_dist.model.kernels.native import NativeKernels

SHAPES = [
    (2, 3, 7, 5),
    (1, 35, 1, 9),
    (2, 12, 4, 1),
    (3, 1, 1, 1),
    (1, 12, 1, 1),
    (2, 1, 3, 3),
    (2, 130, 5, 3),
    (1, 130, 1, 1),
    (5, 35, 16, 14),  # 1120 pixels: more than one thread sums alone
    (3, 12, 33, 31),
]
LARGE = SHAPES[-1]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]

each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On a busy machine more of them wait for each other."""
    with threads(1):
        yield


@pytest.fixture(scope="module")
def native() -> NativeKernels:
    return NativeKernels()


@each_dtype
@each_shape
@pytest.mark.parametrize("wide", [False, True], ids=["dense", "slice"])
def test_bn_relu_equals_float64(native: NativeKernels, shape: tuple[int, ...], dtype: torch.dtype, wide: bool) -> None:
    draw = Draw(shape, dtype, wide=wide)
    maps, norm, out = draw.maps(), draw.norm(), draw.room(shape[1] + 5)
    expected = torch.empty(out.shape, dtype=torch.float64)
    EagerKernels().bn_relu(maps.double(), exact(norm), expected)
    native.bn_relu(maps, norm, out)
    assert_stored(out, expected, 10)
    assert (out[:, shape[1] :] == 0).all()
    assert draw.untouched()


@each_dtype
@each_shape
@pytest.mark.parametrize("place", ["elsewhere", "slice", "in place", "in place, narrower"])
@pytest.mark.parametrize("masked", [False, True], ids=["all kept", "masked"])
@pytest.mark.parametrize("counted", [False, True], ids=["", "counted"])
def test_write_equals_float64(
    native: NativeKernels, shape: tuple[int, ...], dtype: torch.dtype, place: str, masked: bool, counted: bool
) -> None:
    draw = Draw(shape, dtype, wide=place == "slice")
    made = draw.maps(shape[1] + (3 if place in ("slice", "in place, narrower") else 0))
    beyond = made[:, shape[1] :].clone()
    slot = made[:, : shape[1]] if place.startswith("in place") else draw.room()
    mask = draw.mask() if masked else None
    mean, var = (draw.vector(0, 1), draw.vector(0, 1)) if counted else (None, None)
    dropped = torch.empty(shape, dtype=torch.float64)
    EagerKernels().write(made.double(), mask, 0.7, dropped, None, None)

    native.write(made, mask, 0.7, slot, mean, var)

    assert_stored(slot, dropped)
    assert torch.equal(made[:, shape[1] :], beyond)
    assert draw.untouched()
    if mean is not None and var is not None:  # of what was stored, rounding included
        torch.testing.assert_close(mean.double(), slot.double().mean((0, 2, 3)), rtol=1e-6, atol=SUMMING[dtype])
        of_stored = slot.double().var((0, 2, 3), correction=0)
        torch.testing.assert_close(var.double(), of_stored, rtol=10 * SUMMING[dtype], atol=1e-30)


@each_dtype
@each_shape
@pytest.mark.parametrize("count", range(1, MOST_CONSUMERS + 1))
@pytest.mark.parametrize("carried", ["nothing", "carry", "carry into itself", "accumulation type"])
def test_gather_equals_float64(
    native: NativeKernels, shape: tuple[int, ...], dtype: torch.dtype, count: int, carried: str
) -> None:
    draw = Draw(shape, dtype, wide=count % 2 == 0)
    norms = [draw.norm(eps) for eps in (1e-3, 1e-5, 0.1, 0.5)[:count]]
    maps = away_from_zero(draw, norms)
    sums = [torch.full((2, shape[1]), math.nan, dtype=accumulation_type(dtype)) for _ in norms]
    consumers = [Consumer(draw.maps(), norm, into) for norm, into in zip(norms, sums, strict=True)]
    carry = None if carried == "nothing" else draw.maps()
    wide = accumulation_type(dtype) if carried == "accumulation type" else None
    out = carry if carried == "carry into itself" else draw.room(dtype=wide)
    expected, expected_sums = torch.empty(shape, dtype=torch.float64), torch.zeros(count, 2, shape[1]).double()
    exactly = [Consumer(c.gradient.double(), exact(c.norm), s) for c, s in zip(consumers, expected_sums, strict=True)]
    EagerKernels().gather(maps.double(), exactly, double(carry), expected)

    native.gather(maps, consumers, carry, out)

    assert_stored(out, expected, 10)
    assert draw.untouched()
    pixels = maps.numel() // shape[1]
    for found, exact_sums in zip(sums, expected_sums, strict=True):
        torch.testing.assert_close(found.double(), exact_sums, rtol=1e-5, atol=10 * SUMMING[dtype] * pixels)


@each_dtype
@pytest.mark.parametrize("channels", [1, 3, 12, 35, 130])
def test_the_gradient_passes_exactly_where_the_rectified_map_is_positive(
    native: NativeKernels, dtype: torch.dtype, channels: int
) -> None:
    """However close to 0: one rounding apart, and the gradient would be of another function."""
    draw = Draw((4, channels, 9, 7), dtype)
    norm = draw.norm()
    norm.mean[::2] = norm.beta[::2] = 0
    near = draw.maps().double() * {torch.float64: 1e-15, torch.float32: 3e-7, torch.bfloat16: 1e-2}[dtype]
    maps = draw.room().copy_(near + (norm.mean - norm.beta / norm.scale())[:, None, None])
    maps[0, ::2] = 0
    rectified, total, sums = draw.room(), draw.room(), torch.zeros(2, channels, dtype=accumulation_type(dtype))
    native.bn_relu(maps, norm, rectified)
    native.gather(maps, [Consumer(torch.ones_like(maps), norm, sums)], None, total)
    assert torch.equal(rectified > 0, total > 0)
    assert torch.equal(sums[0].double(), (rectified > 0).double().sum((0, 2, 3)))
    assert (total[0, ::2] == 0).all()  # where y is 0 nothing passes
    if channels > 1:
        assert 0.1 < (rectified[1:] > 0).double().mean() < 0.9


@each_dtype
@each_shape
@pytest.mark.parametrize("corrected", [False, True], ids=["", "corrected"])
@pytest.mark.parametrize("masked", [False, True], ids=["all kept", "masked"])
@pytest.mark.parametrize("wide", [False, True], ids=["maps' type", "accumulation type, slices"])
def test_finish_equals_float64(
    native: NativeKernels, shape: tuple[int, ...], dtype: torch.dtype, corrected: bool, masked: bool, wide: bool
) -> None:
    draw = Draw(shape, dtype, wide=wide)
    gradient, maps = draw.maps(dtype=accumulation_type(dtype) if wide else None), draw.maps()
    correction = tuple(draw.vector(-1, 1) for _ in range(3)) if corrected else None
    mask, out = draw.mask() if masked else None, draw.room(shape[1] + 5)
    expected = torch.empty(out.shape, dtype=torch.float64)
    exactly = None if correction is None else tuple(vector.double() for vector in correction)
    EagerKernels().finish(gradient.double(), maps.double(), exactly, mask, 0.7, expected)

    native.finish(gradient, maps, correction, mask, 0.7, out)

    assert_stored(out, expected, 10)
    assert (out[:, shape[1] :] == 0).all()
    assert draw.untouched()


@each_dtype
def test_a_gradient_is_finished_in_place(native: NativeKernels, dtype: torch.dtype) -> None:
    draw = Draw(LARGE, dtype)
    gradient, maps, mask = draw.maps(), draw.maps(), draw.mask()
    elsewhere = draw.room()
    native.finish(gradient, maps, None, mask, 0.7, elsewhere)
    native.finish(gradient, maps, None, mask, 0.7, gradient)
    assert torch.equal(gradient, elsewhere)


@each_dtype
@pytest.mark.parametrize("channel", [0, 10, 34])
def test_nan_stays_nan_and_in_its_channel(native: NativeKernels, dtype: torch.dtype, channel: int) -> None:
    draw = Draw((5, 35, 16, 14), dtype)
    maps, norm, out, wide = draw.maps(), draw.norm(), draw.room(), draw.room(dtype=accumulation_type(dtype))
    pixel = (4, channel, 3, 7)
    maps[pixel] = math.nan
    only_pixel, only_channel = torch.zeros(maps.shape, dtype=torch.bool), torch.arange(35) == channel
    only_pixel[pixel] = True

    native.bn_relu(maps, norm, out)
    assert torch.equal(out.isnan(), only_pixel)

    mean, var = draw.vector(0, 1), draw.vector(0, 1)
    native.write(maps, None, 1.0, out, mean, var)
    assert torch.equal(out.isnan(), only_pixel)
    assert torch.equal(mean.isnan(), only_channel)
    assert torch.equal(var.isnan(), only_channel)

    sums = torch.zeros(2, 35, dtype=accumulation_type(dtype))
    gradient = draw.maps()
    native.gather(maps, [Consumer(gradient, norm, sums)], None, wide)
    assert not wide.isnan().any()  # what came back passes through, as through PyTorch's ReLU
    torch.testing.assert_close(wide[pixel], norm.scale()[channel] * gradient[pixel])
    assert torch.equal(sums.isnan(), torch.stack([torch.zeros(35, dtype=torch.bool), only_channel]))
    gradient[pixel] = math.nan
    native.gather(draw.maps().abs() + 9, [Consumer(gradient, norm, sums)], None, out)
    assert torch.equal(out.isnan(), only_pixel)
    assert torch.equal(sums.isnan(), only_channel.expand(2, 35))

    native.finish(draw.maps(), maps, (norm.mean, norm.beta, norm.gamma), None, 1.0, out)
    assert torch.equal(out.isnan(), only_pixel)
    native.finish(gradient, draw.maps(), None, None, 1.0, out)
    assert torch.equal(out.isnan(), only_pixel)


@pytest.mark.parametrize(("mean", "std"), [(1e4, 1.0), (-1e4, 1.0), (1e2, 1e-2), (0.0, 1e-6), (3e16, 1e15)])
def test_the_variance_survives_a_mean_far_from_zero(native: NativeKernels, mean: float, std: float) -> None:
    draw = Draw((4, 3, 40, 33), torch.float32)
    maps = draw.maps()
    maps.mul_(std).add_(mean)
    maps[:, 1] = mean  # a channel that does not vary
    found_mean, found_var = draw.vector(0, 1), draw.vector(0, 1)
    native.write(maps, None, 1.0, draw.room(), found_mean, found_var)
    stored = maps.double()
    torch.testing.assert_close(found_mean.double(), stored.mean((0, 2, 3)), rtol=1e-6, atol=1e-6 * std)
    expected = stored.var((0, 2, 3), correction=0)
    torch.testing.assert_close(found_var.double()[::2], expected[::2], rtol=1e-4, atol=0)
    assert 0 <= found_var[1] <= 1e-12 * mean**2


def all_passes(native: NativeKernels, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    draw = Draw(shape, dtype)
    maps, norm, mask = draw.maps(), draw.norm(), draw.mask()
    rectified, slot, total, finished = (draw.room() for _ in range(4))
    mean, var = draw.vector(0, 1), draw.vector(0, 1)
    sums = torch.zeros(2, 2, shape[1], dtype=accumulation_type(dtype))
    native.bn_relu(maps, norm, rectified)
    native.write(maps, mask, 0.7, slot, mean, var)
    consumers = [Consumer(draw.maps(), draw.norm(), into) for into in sums]
    native.gather(maps, consumers, draw.maps(), total)
    native.finish(total, maps, (norm.mean, norm.beta, norm.gamma), mask, 0.7, finished)
    return [rectified, slot, mean, var, total, sums, finished]


@each_dtype
@pytest.mark.parametrize("shape", [(3, 12, 33, 31), (2, 3, 7, 5), (1, 35, 64, 32)], ids=str)
def test_the_same_bits_with_any_number_of_threads(
    native: NativeKernels, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    found = []
    for number in (1, 2, 3, 1):
        with threads(number):
            found.append(all_passes(native, shape, dtype))
    for other in found[1:]:
        for one, tensor in zip(found[0], other, strict=True):
            assert torch.equal(one, tensor)


def test_bfloat16_is_rounded_as_pytorch_rounds_it(native: NativeKernels) -> None:
    """To nearest, ties to even; checked on every upper half of a float32 with the lower halves that decide."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    values = (upper[:, None] | lower).view(torch.float32)
    gradient = values.reshape(1, 1, *values.shape).clone()
    maps = torch.zeros(gradient.shape, dtype=torch.bfloat16)
    out = torch.empty_like(maps)
    native.finish(gradient, maps, None, None, 1.0, out)
    expected = gradient.bfloat16()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num().view(torch.int16), expected.nan_to_num().view(torch.int16))
    assert out.isinf().sum() > 2  # the largest finite numbers round to infinity


@each_dtype
def test_where_dropout_keeps_nothing_all_is_zero(native: NativeKernels, dtype: torch.dtype) -> None:
    draw = Draw((2, 12, 4, 3), dtype)
    maps, slot, out = draw.maps(), draw.room(), draw.room()
    nothing = torch.zeros_like(draw.mask())
    mean, var = draw.vector(1, 2), draw.vector(1, 2)
    native.write(maps, nothing, 0.0, slot, mean, var)
    native.finish(maps, maps, None, nothing, 0.0, out)
    for tensor in (slot, out, mean, var):
        assert (tensor == 0).all()


@pytest.mark.parametrize("kernels", [NativeKernels, EagerKernels])
def test_what_is_dropped_is_zero_and_what_is_kept_is_divided(kernels: type[NativeKernels | EagerKernels]) -> None:
    draw = Draw((2, 12, 4, 3), torch.float64)
    maps, mask, slot = draw.maps(), draw.mask(), draw.room()
    kernels().write(maps, mask, 0.25, slot, None, None)
    assert (slot[~mask] == 0).all()
    assert torch.equal(slot[mask], maps[mask] * 4)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda maps: maps.contiguous(),  # NCHW
        lambda maps: maps[:, :, ::2],  # every other row of pixels
        lambda maps: maps[:, ::2],  # every other channel
        lambda maps: maps.transpose(2, 3),
        lambda maps: maps[:1].expand(4, -1, -1, -1),
    ],
    ids=["NCHW", "rows", "channels", "transposed", "expanded"],
)
def test_maps_in_another_layout_are_refused(native: NativeKernels, spoil) -> None:
    """Pointers go to code that trusts them."""
    draw = Draw((4, 6, 8, 5), torch.float32)
    maps = draw.maps()
    native.bn_relu(maps, draw.norm(), draw.room())
    spoilt = spoil(maps)
    norm = draw.norm().narrow(0, spoilt.shape[1])
    with pytest.raises(AssertionError, match="strides"):
        native.bn_relu(spoilt, norm, torch.empty(spoilt.shape).contiguous(memory_format=torch.channels_last))


def test_types_it_has_no_passes_for_are_not_taken() -> None:
    assert [dtype for dtype in (*DTYPES, torch.float16, torch.int32) if not NativeKernels.takes(dtype)] == [
        torch.float16,
        torch.int32,
    ]


def test_norms_and_sums_of_another_type_are_refused(native: NativeKernels) -> None:
    draw = Draw((2, 3, 4, 4), torch.bfloat16)
    maps, norm = draw.maps(), draw.norm()
    with pytest.raises(AssertionError):
        native.bn_relu(maps, exact(norm), draw.room())
    for wrong in (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 4), torch.zeros(3, 2).T):
        with pytest.raises(AssertionError):
            native.gather(maps, [Consumer(draw.maps(), norm, wrong)], None, draw.room())


def test_all_that_a_pass_reads_it_leaves_alone(native: NativeKernels) -> None:
    draw = Draw((2, 12, 4, 3), torch.float32, wide=True)
    maps, gradient, carry, norm, mask = draw.maps(), draw.maps(), draw.maps(), draw.norm(), draw.mask()
    before = [tensor.clone() for tensor in (maps, gradient, carry, *norm[:4], mask)]
    sums = torch.zeros(2, 12)
    native.bn_relu(maps, norm, draw.room())
    native.write(maps, mask, 0.7, draw.room(), draw.vector(0, 1), draw.vector(0, 1))
    native.gather(maps, [Consumer(gradient, norm, sums)], carry, draw.room())
    native.finish(gradient, maps, (norm.mean, norm.beta, norm.gamma), mask, 0.7, draw.room())
    for tensor, old in itertools.zip_longest((maps, gradient, carry, *norm[:4], mask), before):
        assert torch.equal(tensor, old)
