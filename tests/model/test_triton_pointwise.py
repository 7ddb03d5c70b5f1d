"""The pointwise passes as Triton kernels: against the eager ones in float64, on a GPU or in Triton's interpreter."""

from typing import Any

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICES, DTYPES, INTERPRETED, Draw, Untouched, check_statistics, close, double, run_interpreted

from densenet_dist.model.kernels.eager import EagerKernels
from densenet_dist.model.kernels.interface import MOST_CONSUMERS, Consumer, Kernels, Norm

EAGER = EagerKernels()
Shape = tuple[int, int, int, int]
Case = tuple[Shape, tuple[int, int], int]

# A shape, the channels that its buffer has before and after it, and those that an output has beyond an input's: nothing
# aligned; all aligned; one pixel; one channel, and more rows than a tile has; all aligned but the number of channels;
# aligned by fours; more channels than a tile has.
CASES: list[Case] = [
    ((2, 35, 7, 5), (3, 6), 5),
    ((2, 40, 9, 9), (8, 16), 0),
    ((1, 12, 1, 1), (0, 0), 0),
    ((3, 1, 13, 17), (3, 6), 0),
    ((1, 35, 9, 9), (0, 5), 5),
    ((1, 36, 4, 4), (4, 4), 0),
    ((1, 130, 3, 2), (0, 0), 0),
]
if not INTERPRETED:
    CASES += [((64, 40, 32, 32), (40, 400), 0), ((5, 475, 31, 33), (0, 5), 5)]

# All in the types that nets are trained in; of the others the first two.
every_case = pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case}-{dtype}".replace(" ", ""))
        for dtype in DTYPES
        for case in (CASES if dtype in (torch.float32, torch.bfloat16) else CASES[:2])
    ],
)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def kernels() -> Kernels:
    pytest.importorskip("triton")
    from densenet_dist.model.kernels.triton_pointwise import TritonPointwise

    return TritonPointwise()


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="starts what runs now")
def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(__file__)


@every_case
def test_bn_relu(kernels: Kernels, device: str, case: Case, dtype: torch.dtype) -> None:
    shape, (before, after), padding = case
    n, c, h, w = shape
    draw = Draw(device, dtype)
    x, norm = draw.maps(*shape, before=before, after=after), draw.norm(c)
    out = draw.maps(n, c + padding, h, w, before=before, after=after)
    rest, expected = Untouched(out), torch.empty(n, c + padding, h, w, device=device, dtype=torch.float64)

    kernels.bn_relu(x, norm, out)

    EAGER.bn_relu(x.double(), double(norm), expected)
    close(out, expected)
    rest.check()


@every_case
@pytest.mark.parametrize("dropout", [False, True])
def test_write(kernels: Kernels, device: str, dropout: bool, case: Case, dtype: torch.dtype) -> None:
    shape, (before, after), padding = case
    n, c, h, w = shape
    draw = Draw(device, dtype)
    made, mask = draw.maps(n, c + padding, h, w), draw.mask(*shape, keep=0.8) if dropout else None
    slot, mean, var = draw.maps(*shape, before=before, after=after), draw.normal(c), draw.normal(c)
    rest, expected = Untouched(slot), torch.empty(shape, device=device, dtype=torch.float64)

    kernels.write(made, mask, 0.8, slot, mean, var)

    EAGER.write(made.double(), mask, 0.8, expected, None, None)
    close(slot, expected)
    check_statistics(slot, mean, var)
    rest.check()


@pytest.mark.parametrize("dropout", [False, True])
def test_write_in_place(kernels: Kernels, device: str, dropout: bool) -> None:
    shape = (2, 35, 9, 9)
    draw = Draw(device)
    made, mask = draw.maps(*shape, before=1, after=4), draw.mask(*shape, keep=0.5) if dropout else None
    rest, expected, mean, var = Untouched(made), made.clone(), draw.normal(35), draw.normal(35)
    if mask is not None:
        expected *= mask / 0.5
    kernels.write(made, mask, 0.5, made, mean, var)
    assert torch.equal(made, expected)
    check_statistics(made, mean, var)
    rest.check()

    kernels.write(made, None, 0.5, made, None, None)
    kernels.write(made, mask, 1.0, made, None, None)
    assert torch.equal(made, expected)


def test_variance_beside_a_large_mean(kernels: Kernels, device: str) -> None:
    """The mean of squares less the square of the mean would have no digit right, nor tiles that differ by much."""
    draw = Draw(device)
    made = draw.maps(2, 5, 13, 17) + 3e4
    made[1] += 100
    mean, var = draw.normal(5), draw.normal(5)
    kernels.write(made, None, 1.0, made, mean, var)
    close(mean, made.double().mean((0, 2, 3)), 1e-6)
    close(var, made.double().var((0, 2, 3), unbiased=False), 1e-4)


@every_case
@pytest.mark.parametrize("carried", ["nothing", "maps", "wide", "in place"])
def test_gather(kernels: Kernels, device: str, carried: str, case: Case, dtype: torch.dtype) -> None:
    shape, (before, after), _ = case
    c = shape[1]
    draw = Draw(device, dtype)
    count = MOST_CONSUMERS if carried == "maps" else 2 if carried == "wide" else 1
    x = draw.maps(*shape, before=before, after=after)
    out = draw.maps(*shape, before=before, after=after, dtype=None if carried == "maps" else draw.wide)
    carry = {"nothing": None, "maps": draw.maps(*shape), "wide": draw.maps(*shape, dtype=draw.wide), "in place": out}
    total = carry[carried]
    gradients = [draw.maps(*shape, before=before, after=after) for _ in range(count)]
    norms = [draw.norm(c) for _ in range(count)]
    sums = [draw.normal(2, c + 7)[:, 5 : 5 + c] for _ in range(count)]
    wanted = [torch.empty(2, c, device=device, dtype=torch.float64) for _ in range(count)]
    rest, expected = Untouched(out), torch.empty(shape, device=device, dtype=torch.float64)
    EAGER.gather(
        x.double(),
        [Consumer(g.double(), double(norm), s) for g, norm, s in zip(gradients, norms, wanted, strict=True)],
        None if total is None else total.double(),
        expected,
    )

    kernels.gather(x, [Consumer(*parts) for parts in zip(gradients, norms, sums, strict=True)], total, out)

    close(out, expected)
    for found, right in zip(sums, wanted, strict=True):
        close(found, right, 1e-13 if draw.wide == torch.float64 else 5e-6)
    rest.check()


@every_case
@pytest.mark.parametrize(("corrected", "dropout"), [(True, True), (True, False), (False, True)])
def test_finish(kernels: Kernels, device: str, corrected: bool, dropout: bool, case: Case, dtype: torch.dtype) -> None:
    shape, (before, after), padding = case
    n, c, h, w = shape
    draw = Draw(device, dtype)
    gradient = draw.maps(*shape, before=before, after=after, dtype=draw.wide if corrected else None)
    x, out = draw.maps(*shape, before=before, after=after), draw.maps(n, c + padding, h, w, before=before, after=after)
    correction = (draw.normal(c), draw.normal(c), draw.normal(c)) if corrected else None
    mask = draw.mask(*shape, keep=0.7) if dropout else None
    rest, expected = Untouched(out), torch.empty(n, c + padding, h, w, device=device, dtype=torch.float64)

    kernels.finish(gradient, x, correction, mask, 0.7, out)

    exact = None if correction is None else tuple(vector.double() for vector in correction)
    EAGER.finish(gradient.double(), x.double(), exact, mask, 0.7, expected)
    close(out, expected)
    rest.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_masks_what_forward_did(kernels: Kernels, device: str, dtype: torch.dtype) -> None:
    """Also where norm(x) is but rounding errors: both must take them for the same."""
    draw = Draw(device, dtype)
    x = draw.maps(1, 40, 9, 9)
    gamma, _, mean, var, eps = draw.norm(40)
    near = x[0, :, 4, 4].to(draw.wide)
    norm = Norm(gamma, -(near - mean) * gamma * torch.rsqrt(var + eps), mean, var, eps)
    x[0, :, :, ::2] = near.to(dtype)[:, None, None]
    out, back = torch.empty_like(x, dtype=draw.wide), torch.empty_like(x, dtype=draw.wide)
    kernels.bn_relu(x, norm, out)
    consumer = Consumer(torch.ones_like(x), norm, draw.normal(2, 40))
    kernels.gather(x, [consumer], None, back)
    assert torch.equal(out > 0, back != 0)
    assert 0.05 < (out == 0).float().mean() < 0.95
    assert out[:, :, :, ::2].abs().max() < 1e-4


def test_nan_is_passed_on(kernels: Kernels, device: str) -> None:
    draw = Draw(device)
    shape = (1, 35, 3, 4)
    nan = torch.zeros(shape, dtype=torch.bool, device=device)
    nan[0, 20, 1, 2] = True
    x = draw.maps(*shape)
    x[nan] = torch.nan
    out, mask, norm, sums = torch.empty_like(x), draw.mask(*shape, keep=0.5), draw.norm(35), draw.normal(2, 35)
    mask[nan] = False

    kernels.bn_relu(x, norm, out)
    assert torch.equal(out.isnan(), nan)

    mean, var = draw.normal(35), draw.normal(35)
    kernels.write(x, mask, 0.5, out, mean, var)
    assert torch.equal(out.isnan(), nan)
    assert torch.equal(mean.isnan(), nan.any((0, 2, 3)))
    assert torch.equal(var.isnan(), nan.any((0, 2, 3)))

    # What comes back where norm(x) is NaN passes, as it does through PyTorch's ReLU.
    kernels.gather(x, [Consumer(torch.ones_like(x), norm, sums)], None, out)
    assert torch.equal(out[nan], norm.scale()[20:21])
    assert not out.isnan().any()
    assert not sums[0].isnan().any()
    assert torch.equal(sums[1].isnan(), nan.any((0, 2, 3)))

    kernels.finish(x, out, None, mask, 0.5, out)
    assert torch.equal(out.isnan(), nan)


@pytest.mark.parametrize("shape", [(3, 40, 9, 9), (2, 35, 9, 17)])
def test_same_bits_again(kernels: Kernels, device: str, shape: Shape) -> None:
    found: list[list[Tensor]] = []
    for _ in range(2):
        draw = Draw(device, torch.bfloat16)
        c, x = shape[1], draw.maps(*shape)
        mean, var, sums, out = draw.normal(c), draw.normal(c), draw.normal(2, c), draw.maps(*shape)
        kernels.write(x, draw.mask(*shape, keep=0.8), 0.8, out, mean, var)
        kernels.gather(out, [Consumer(draw.maps(*shape), draw.norm(c), sums)], x, x)
        found.append([x, out, mean, var, sums])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_refuses_what_is_not_as_the_interface_says(kernels: Kernels) -> None:
    draw = Draw("cpu")
    x, norm = draw.maps(2, 6, 4, 3), draw.norm(6)
    out = torch.empty_like(x)
    with pytest.raises(ValueError, match="channels_last"):
        kernels.bn_relu(x.contiguous(), norm, out)
    with pytest.raises(ValueError, match="channels_last"):
        kernels.bn_relu(x[:, :, ::2], norm, out[:, :, ::2])
    with pytest.raises(ValueError, match="some of them"):
        kernels.bn_relu(x[:0], norm, out[:0])
    with pytest.raises(ValueError, match="6 channels"):
        kernels.bn_relu(x, norm.narrow(0, 5), out)
    with pytest.raises(ValueError, match="float32"):
        kernels.bn_relu(x, double(norm), out)
    with pytest.raises(ValueError, match="6 maps"):
        kernels.bn_relu(x, norm, out[:, :5])
    with pytest.raises(ValueError, match="channels_last"):
        kernels.write(x, torch.ones(2, 6, 4, 3, dtype=torch.bool), 0.5, out, None, None)
    with pytest.raises(ValueError, match="0 consumers"):
        kernels.gather(x, [], None, out)


def test_reads_at_once_what_memory_holds() -> None:
    pytest.importorskip("triton")
    from densenet_dist.model.kernels.triton_common import read_width, write_width

    def rows(channels: int, ld: int, start: int = 0, beyond: int = 0) -> Tensor:
        memory = torch.zeros(start + 5 * ld + channels + beyond, dtype=torch.bfloat16)
        return memory.as_strided((2, channels, 1, 3), (3 * ld, 1, 3 * ld, ld), start)

    assert [read_width(35, rows(35, 40, beyond=beyond)) for beyond in (4, 5)] == [1, 8]
    assert [read_width(35, rows(40, 40, start=start)) for start in (0, 4, 8)] == [8, 1, 8]
    assert [read_width(35, rows(35, ld, beyond=5)) for ld in (40, 44)] == [8, 1]
    assert [write_width(c, rows(c, 48)) for c in (40, 36, 35)] == [8, 4, 1]
    assert write_width(40, rows(40, 40), None, rows(40, 44)) == 4


@pytest.mark.skipif(INTERPRETED, reason="takes gigabytes")
def test_offsets_beyond_32_bits(kernels: Kernels, device: str) -> None:
    ld = 2**30 + 8
    buffer = torch.empty(3 * ld, dtype=torch.bfloat16, device=device)
    x, draw = buffer.as_strided((3, 40, 1, 1), (ld, 1, ld, ld)), Draw(device, torch.bfloat16)
    x.copy_(draw.maps(3, 40, 1, 1))
    out, norm, expected = draw.maps(3, 40, 1, 1), draw.norm(40), torch.empty(3, 40, 1, 1, device=device).double()
    kernels.bn_relu(x, norm, out)
    EAGER.bn_relu(x.double(), double(norm), expected)
    close(out, expected)
