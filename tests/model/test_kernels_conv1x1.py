"""BN-ReLU with a 1x1 convolution in C++ against PyTorch's operators, which compute here in float64."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from maps import SUMMING, Draw, away_from_zero, double, exact, threads
from torch import Tensor
from torch.nn import functional as F

from densenet_dist.model.kernels.eager import EagerKernels
from densenet_dist.model.kernels.interface import Consumer, Norm
from densenet_dist.model.kernels.native import NativeKernels

# The kernels take 64 rows (pixels) at a time, one thread 1024 or more of them; columns in tiles of three vectors, which
# hold 2 to 16 numbers: all the remainders.
CASES = [
    ((1, 1, 1, 1), 1),
    ((1, 130, 1, 1), 17),
    ((2, 3, 3, 1), 8),
    ((1, 8, 1, 9), 3),
    ((3, 12, 7, 3), 48),  # 63 rows
    ((4, 48, 4, 4), 12),  # 64
    ((1, 17, 5, 13), 16),  # 65
    ((2, 16, 7, 5), 17),
    ((2, 1, 7, 5), 130),
    ((2, 130, 7, 5), 1),
    ((2, 49, 5, 13), 48),
    ((2, 48, 5, 13), 49),
    ((2, 75, 5, 13), 12),
    ((2, 12, 5, 13), 75),
    ((5, 3, 16, 14), 12),  # 1120
    ((5, 130, 16, 14), 49),
    ((3, 49, 33, 31), 130),  # 3069
    ((17, 3, 65, 61), 8),  # 67,405: more than 64 times 1024
]
LARGE = CASES[-1]
DTYPES = [torch.float32, torch.float64]

each_case = pytest.mark.parametrize(("shape", "makes"), CASES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_place = pytest.mark.parametrize("wide", [False, True], ids=["dense", "slice"])


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On a busy machine more of them wait for each other."""
    with threads(1):
        yield


@pytest.fixture(scope="module")
def native() -> NativeKernels:
    return NativeKernels()


def draw_weight(draw: Draw, makes: int) -> Tensor:
    return torch.randn(makes, draw.shape[1], 1, 1, generator=draw.generator).to(draw.dtype)


def unwritten(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype)


def rectify_exactly(maps: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """relu(norm(maps)) in float64, and the sum of the absolute values that y is the sum of, where it is above 0."""
    rectified = torch.empty(maps.shape, dtype=torch.float64)
    norm = exact(norm)
    EagerKernels().bn_relu(maps.double(), norm, rectified)
    apart = maps.double().abs() + norm.mean.abs()[:, None, None]
    absolute = apart * norm.scale()[:, None, None] + norm.beta.abs()[:, None, None]
    return rectified, absolute


def assert_summed(found: Tensor, expected: Tensor, absolute: Tensor) -> None:
    """Compare with a sum in float64, but for the roundings of one whose terms' absolute values sum to `absolute`."""
    off = (found.double() - expected).abs() / absolute.clamp_min(1e-300)
    assert found.shape == expected.shape == absolute.shape
    assert (off <= SUMMING[found.dtype]).all(), f"off by {off.max():.1e} of the terms' absolute values"


@each_dtype
@each_case
@each_place
@pytest.mark.parametrize("masked", [False, True], ids=["all kept", "masked"])
@pytest.mark.parametrize("counted", [False, True], ids=["", "counted"])
def test_forward_equals_float64(
    native: NativeKernels, shape: tuple[int, ...], makes: int, dtype: torch.dtype, wide: bool, masked: bool,
    counted: bool,
) -> None:  # fmt: skip
    draw = Draw(shape, dtype, wide=wide)
    maps, norm, weight, slot = draw.maps(), draw.norm(), draw_weight(draw, makes), draw.room(makes)
    mask = draw.mask(makes) if masked else None
    mean, var = (unwritten(makes, dtype=dtype), unwritten(makes, dtype=dtype)) if counted else (None, None)
    rectified, terms = rectify_exactly(maps, norm)
    expected, absolute = F.conv2d(rectified, weight.double()), F.conv2d(terms, weight.double().abs())
    for made in (expected, absolute):
        EagerKernels().write(made, mask, 0.7, made, None, None)

    native.conv1x1(maps, norm, weight, mask, 0.7, slot, mean, var)

    assert_summed(slot, expected, absolute)
    assert draw.untouched()
    if mean is not None and var is not None:  # of what was stored, rounding included
        stored = slot.double()
        assert_summed(mean, stored.mean((0, 2, 3)), stored.abs().mean((0, 2, 3)))
        of_stored = stored.var((0, 2, 3), correction=0)
        torch.testing.assert_close(var.double(), of_stored, rtol=10 * SUMMING[dtype], atol=1e-30)


@each_dtype
@each_case
@each_place
@pytest.mark.parametrize("carried", ["nothing", "carry", "carry into itself"])
@pytest.mark.parametrize("needed", [True, False], ids=["", "weight fixed"])
def test_backward_equals_float64(
    native: NativeKernels, shape: tuple[int, ...], makes: int, dtype: torch.dtype, wide: bool, carried: str,
    needed: bool,
) -> None:  # fmt: skip
    draw = Draw(shape, dtype, wide=wide)
    norm, weight = draw.norm(), draw_weight(draw, makes)
    maps, d_made = away_from_zero(draw, [norm]), draw.maps(makes)
    carry = None if carried == "nothing" else draw.maps()
    out = carry if carry is not None and carried == "carry into itself" else draw.room()
    sums = unwritten(2, shape[1], dtype=dtype)
    d_weight = unwritten(*weight.shape, dtype=dtype) if needed else None

    rectified, terms = rectify_exactly(maps, norm)
    expected, absolute = torch.empty(2, *shape, dtype=torch.float64)
    expected_sums, absolute_sums = torch.empty(2, 2, shape[1], dtype=torch.float64)
    came = F.conv_transpose2d(d_made.double(), weight.double())
    EagerKernels().gather(maps.double(), [Consumer(came, exact(norm), expected_sums)], double(carry), expected)
    came = F.conv_transpose2d(d_made.double().abs(), weight.double().abs()) * (rectified > 0)
    absolute.copy_(came * norm.scale().double()[:, None, None]).add_(0 if carry is None else carry.double().abs())
    absolute_sums[0] = came.sum((0, 2, 3))
    absolute_sums[1] = (came * (maps.double().abs() + norm.mean.double().abs()[:, None, None])).sum((0, 2, 3))

    native.conv1x1_backward(maps, norm, weight, d_made, carry, out, sums, d_weight)

    assert_summed(out, expected, absolute)
    assert_summed(sums, expected_sums, absolute_sums)
    assert draw.untouched()
    if d_weight is not None:
        products = "nkhw,nchw->kc"
        expected_weight = torch.einsum(products, d_made.double(), rectified)
        absolute_weight = torch.einsum(products, d_made.double().abs(), terms)
        assert_summed(d_weight[:, :, 0, 0], expected_weight, absolute_weight)


@each_dtype
@pytest.mark.parametrize("channels", [1, 3, 12, 35, 130])
def test_both_rectify_as_bn_relu_does(native: NativeKernels, dtype: torch.dtype, channels: int) -> None:
    """However close to 0: one rounding apart, and the gradient would be of another function."""
    draw = Draw((4, channels, 9, 7), dtype)
    norm = draw.norm()
    norm.mean[::2] = norm.beta[::2] = 0
    near = draw.maps().double() * {torch.float64: 1e-15, torch.float32: 3e-7}[dtype]
    maps = draw.room().copy_(near + (norm.mean - norm.beta / norm.scale())[:, None, None])
    maps[0, ::2] = 0
    rectified, slot, total, sums = draw.room(), draw.room(), draw.room(), torch.zeros(2, channels, dtype=dtype)
    native.bn_relu(maps, norm, rectified)

    identity = torch.eye(channels, dtype=dtype)[:, :, None, None]
    native.conv1x1(maps, norm, identity, None, 1.0, slot, None, None)
    assert torch.equal(slot, rectified)

    d_weight = torch.empty_like(identity)
    native.conv1x1_backward(maps, norm, identity, torch.ones_like(maps), None, total, sums, d_weight)
    assert torch.equal(rectified > 0, total > 0)
    assert torch.equal(sums[0].double(), (rectified > 0).double().sum((0, 2, 3)))
    assert (total[0, ::2] == 0).all()  # where y is 0 nothing passes
    if channels > 1:
        assert 0.1 < (rectified[1:] > 0).double().mean() < 0.9


def all_at_once(native: NativeKernels, given: dict[str, Any]) -> list[Tensor]:
    """Slot, mean, variance, out, sums, and the weight's gradient."""
    maps, norm, weight, d_made = given["maps"], given["norm"], given["weight"], given["d_made"]
    slot, out, d_weight = torch.empty_like(d_made), torch.empty_like(maps), torch.empty_like(weight)
    mean, var = (maps.new_empty(weight.shape[0]) for _ in range(2))
    sums = maps.new_empty(2, maps.shape[1])
    native.conv1x1(maps, norm, weight, given["mask"], 0.7, slot, mean, var)
    native.conv1x1_backward(maps, norm, weight, d_made, given["carry"], out, sums, d_weight)
    return [slot, mean, var, out, sums, d_weight]


def one_by_one(native: NativeKernels, given: dict[str, Any]) -> list[Tensor]:
    """The same by the other passes and PyTorch's convolutions."""
    maps, norm, weight, d_made = given["maps"], given["norm"], given["weight"], given["d_made"]
    rectified, slot, out = torch.empty_like(maps), torch.empty_like(d_made), torch.empty_like(maps)
    mean, var = (maps.new_empty(weight.shape[0]) for _ in range(2))
    sums = maps.new_empty(2, maps.shape[1])
    native.bn_relu(maps, norm, rectified)
    made = F.conv2d(rectified, weight).contiguous(memory_format=torch.channels_last)
    native.write(made, given["mask"], 0.7, slot, mean, var)
    came = F.conv_transpose2d(d_made, weight).contiguous(memory_format=torch.channels_last)
    native.gather(maps, [Consumer(came, norm, sums)], given["carry"], out)
    return [slot, mean, var, out, sums, torch.einsum("nkhw,nchw->kc", d_made, rectified)[:, :, None, None]]


def draw_all(shape: tuple[int, ...], makes: int, dtype: torch.dtype, *, wide: bool = False) -> dict[str, Any]:
    draw = Draw(shape, dtype, wide=wide)
    norm = draw.norm()
    return {
        "norm": norm,
        "maps": away_from_zero(draw, [norm]),
        "weight": draw_weight(draw, makes),
        "mask": draw.mask(makes),
        "d_made": draw.maps(makes),
        "carry": draw.maps(),
    }


@each_dtype
@pytest.mark.parametrize("where", ["maps", "weight", "d_made", "carry"])
@pytest.mark.parametrize("row", [0, 63, 1080, 1124])  # of 1125: the last 37 follow 64 in the same memory, as 1080 is
def test_nan_reaches_what_a_convolution_lets_it_reach(
    native: NativeKernels, dtype: torch.dtype, where: str, row: int
) -> None:
    given = draw_all((5, 17, 15, 15), 9, dtype)
    given["weight"][4, 5] = 0  # times NaN is NaN
    image, pixel = divmod(row, 225)
    channel = 5 if where != "d_made" else 4
    if where == "weight":
        given["weight"][4, 5] = math.nan
    else:
        given[where][image, channel, pixel // 15, pixel % 15] = math.nan
    expected = one_by_one(native, given)
    found = all_at_once(native, given)
    for tensor, other in zip(found, expected, strict=True):
        assert torch.equal(tensor.isnan(), other.isnan())
        torch.testing.assert_close(tensor, other, equal_nan=True, rtol=1e-4, atol=1e-4)
    reached = [bool(tensor.isnan().any()) for tensor in found]
    slot, mean, var, out, sums, d_weight = (True,) * 6
    assert (
        reached
        == {
            # What came back passes where y is NaN, as through PyTorch's ReLU.
            "maps": [slot, mean, var, not out, sums, d_weight],
            "weight": [slot, mean, var, out, sums, not d_weight],
            "d_made": [not slot, not mean, not var, out, sums, d_weight],
            "carry": [not slot, not mean, not var, out, not sums, not d_weight],
        }[where]
    )


@each_dtype
@pytest.mark.parametrize(
    ("shape", "makes"), [((2, 3, 7, 5), 17), ((3, 49, 33, 31), 12), ((1, 12, 64, 32), 48), LARGE], ids=str
)
def test_the_same_bits_with_any_number_of_threads(
    native: NativeKernels, shape: tuple[int, ...], makes: int, dtype: torch.dtype
) -> None:
    given, found = draw_all(shape, makes, dtype), []
    for number in (1, 2, 3, 1):
        with threads(number):
            found.append(all_at_once(native, given))
    for other in found[1:]:
        for one, tensor in zip(found[0], other, strict=True):
            assert torch.equal(one, tensor)


@each_dtype
def test_where_dropout_keeps_nothing_all_is_zero(native: NativeKernels, dtype: torch.dtype) -> None:
    draw = Draw((2, 12, 4, 3), dtype)
    slot, nothing = draw.room(5), torch.zeros_like(draw.mask(5))
    mean, var = unwritten(5, dtype=dtype), unwritten(5, dtype=dtype)
    native.conv1x1(draw.maps(), draw.norm(), draw_weight(draw, 5), nothing, 0.0, slot, mean, var)
    for tensor in (slot, mean, var):
        assert (tensor == 0).all()


@each_dtype
def test_of_no_pixels_all_is_zero(native: NativeKernels, dtype: torch.dtype) -> None:
    _, *found = all_at_once(native, draw_all((0, 12, 4, 3), 5, dtype))
    for tensor in found:
        assert (tensor == 0).all()


@each_dtype
def test_all_that_they_read_they_leave_alone(native: NativeKernels, dtype: torch.dtype) -> None:
    given = draw_all((2, 12, 7, 5), 17, dtype, wide=True)
    tensors = [*given.pop("norm")[:4], *given.values()]
    before = [tensor.clone() for tensor in tensors]
    given["norm"] = Norm(*tensors[:4], 1e-3)
    all_at_once(native, given)
    for tensor, old in itertools.zip_longest(tensors, before):
        assert torch.equal(tensor, old)


@pytest.mark.parametrize(
    ("weight", "dtype", "expected"),
    [
        ((5, 3, 1, 1), torch.float32, True),
        ((5, 3, 1, 1), torch.float64, True),
        ((5, 3, 1, 1), torch.bfloat16, False),
        ((5, 3, 1, 1), torch.float16, False),
        ((5, 3, 3, 3), torch.float32, False),
        ((5, 3, 1, 3), torch.float32, False),
        ((5, 3, 3, 1), torch.float64, False),
        (None, torch.float32, False),
    ],
    ids=str,
)
def test_what_it_convolves(weight: tuple[int, ...] | None, dtype: torch.dtype, expected: bool) -> None:
    assert NativeKernels.convolves(None if weight is None else torch.zeros(weight), dtype) is expected


def nchw(maps: Tensor) -> Tensor:
    return maps.contiguous()


def halves(tensor: Tensor) -> Tensor:
    return tensor.bfloat16()


def doubles(tensor: Tensor) -> Tensor:
    return tensor.double()


def fewer_rows(maps: Tensor) -> Tensor:
    return maps[:, :, :-1].contiguous(memory_format=torch.channels_last)


def fewer_channels(maps: Tensor) -> Tensor:
    return maps[:, :-1].contiguous(memory_format=torch.channels_last)


def every_other(maps: Tensor) -> Tensor:
    return maps.repeat_interleave(2, 1).contiguous(memory_format=torch.channels_last)[:, ::2]


def strided(matrix: Tensor) -> Tensor:
    """The same numbers, by columns."""
    return matrix.transpose(0, 1).contiguous().transpose(0, 1)


def one_less(tensor: Tensor) -> Tensor:
    return tensor[:-1].clone()


def by_rows(weight: Tensor) -> Tensor:
    return weight[:, :, 0, 0]


def three_by_three(weight: Tensor) -> Tensor:
    return weight.expand(-1, -1, 3, 3).contiguous()


FORWARD: dict[str, list[Callable[[Any], Any]]] = {
    "maps": [nchw, doubles, fewer_rows, fewer_channels, every_other],
    "norm": [exact, lambda norm: norm.narrow(0, 5)],
    "weight": [doubles, halves, strided, one_less, by_rows, three_by_three, lambda weight: weight.transpose(0, 1)],
    "mask": [nchw, lambda mask: mask.to(torch.uint8), fewer_rows, fewer_channels],
    "slot": [nchw, doubles, fewer_rows, fewer_channels, every_other],
    "mean": [doubles, one_less, lambda mean: mean.repeat_interleave(2)[::2], lambda _: None],
    "var": [doubles, one_less, lambda var: var.repeat_interleave(2)[::2], lambda _: None],
}
BACKWARD: dict[str, list[Callable[[Any], Any]]] = {
    "maps": FORWARD["maps"],
    "norm": FORWARD["norm"],
    "weight": FORWARD["weight"],
    "d_made": [nchw, doubles, fewer_rows, fewer_channels, every_other],
    "carry": [nchw, doubles, fewer_rows, fewer_channels, every_other],
    "out": [nchw, doubles, fewer_rows, fewer_channels, every_other],
    "sums": [doubles, one_less, strided],
    "d_weight": [doubles, halves, strided, one_less, by_rows, lambda weight: weight.transpose(0, 1)],
}


def refusals(table: dict[str, list[Callable[[Any], Any]]]) -> list[Any]:
    return [
        pytest.param(name, spoil, id=f"{name}: {spoil.__name__}") for name, spoils in table.items() for spoil in spoils
    ]


def assert_refused(function: Callable[..., None], given: dict[str, Any], name: str, spoil: Callable[..., Any]) -> None:
    function(**given)
    with pytest.raises(AssertionError):
        function(**{**given, name: spoil(given[name])})


@pytest.mark.parametrize(("name", "spoil"), refusals(FORWARD))
def test_forward_refuses_what_it_cannot_read(native: NativeKernels, name: str, spoil: Callable[..., Any]) -> None:
    """Pointers go to code that trusts them."""
    draw = Draw((2, 6, 4, 3), torch.float32)
    given = {"maps": draw.maps(), "norm": draw.norm(), "weight": draw_weight(draw, 5), "mask": draw.mask(5)}
    given |= {"keep": 0.7, "slot": draw.room(5), "mean": torch.empty(5), "var": torch.empty(5)}
    assert_refused(native.conv1x1, given, name, spoil)


@pytest.mark.parametrize(("name", "spoil"), refusals(BACKWARD))
def test_backward_refuses_what_it_cannot_read(native: NativeKernels, name: str, spoil: Callable[..., Any]) -> None:
    draw = Draw((2, 6, 4, 3), torch.float32)
    weight = draw_weight(draw, 5)
    given = {"maps": draw.maps(), "norm": draw.norm(), "weight": weight, "d_made": draw.maps(5), "carry": draw.maps()}
    given |= {"out": draw.room(), "sums": torch.empty(2, 6), "d_weight": torch.empty_like(weight)}
    assert_refused(native.conv1x1_backward, given, name, spoil)
