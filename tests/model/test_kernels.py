"""The kernels in C++ and Triton compared with those in PyTorch operators, in float64.

Triton's run in its interpreter, and on a GPU if there is one: see tests/support/kernel_cases.py.
"""

import math
from collections.abc import Iterator

import pytest
import torch
from fused import Block, assert_same, maps, take_step
from kernel_cases import (
    INTERPRETED,
    NAMES,
    Draw,
    Untouched,
    check_statistics,
    close,
    device_of,
    double,
    keep_away_from_zero,
    make_kernels,
    run_interpreted,
)

from densenet_dist.model.fused import backward, convolutions, forward, operator
from densenet_dist.model.kernels import interface
from densenet_dist.model.kernels.interface import Consumer, Correction, Kernels, Norm, NormGrad, OutputGradient
from densenet_dist.model.kernels.native import NativeKernels

EXACT = Kernels()
Case = tuple[tuple[int, int, int, int], tuple[int, int], int]

# A shape, the channels before and after it in its buffer, and the channels by which an output is padded.
CASES: list[Case] = [
    ((2, 35, 7, 5), (3, 6), 5),  # nothing aligned
    ((2, 40, 9, 9), (8, 16), 0),  # all aligned
    ((1, 12, 1, 1), (0, 0), 0),  # one pixel
    ((3, 1, 13, 17), (3, 6), 0),  # one channel, and more rows than a tile of Triton
    ((1, 36, 4, 4), (4, 4), 0),  # aligned by fours
    ((1, 130, 3, 2), (0, 0), 0),  # more channels than a tile
]
MANY_PIXELS = (2, 12, 9, 17) if INTERPRETED else (3, 12, 33, 31)
if not INTERPRETED:
    CASES += [((5, 35, 16, 14), (0, 5), 5)]  # 1120 pixels: more than one thread sums
if torch.cuda.is_available() and not INTERPRETED:
    CASES += [((64, 40, 32, 32), (40, 400), 0), ((5, 475, 31, 33), (0, 5), 5)]

with_names = pytest.mark.parametrize("name", NAMES)


def cases(name: str) -> Iterator[tuple[Case, torch.dtype]]:
    """Yield all cases in float32; only the first two in dtypes that are slow or hardly differ."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16):
        if name != "native" or dtype != torch.float16:
            some = dtype in (torch.float64, torch.float16) or (dtype == torch.bfloat16 and INTERPRETED)
            yield from ((case, dtype) for case in (CASES[:2] if some else CASES))


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_triton_in_the_interpreter() -> None:
    run_interpreted(__file__)


@with_names
def test_bn_relu(name: str) -> None:
    for case, dtype in cases(name):
        shape, (before, after), padding = case
        n, c, h, w = shape
        draw = Draw(device_of(name), dtype)
        x, norm = draw.maps(*shape, before=before, after=after), draw.norm(c)
        out = draw.maps(n, c + padding, h, w, before=before, after=after)
        rest, expected = Untouched(out), torch.empty(out.shape, device=out.device, dtype=torch.float64)
        EXACT.bn_relu(x.double(), double(norm), expected)
        make_kernels(name).bn_relu(x, norm, out)
        close(out, expected, label=(case, dtype))
        rest.check()


@with_names
@pytest.mark.parametrize("dropout", [False, True])
def test_store_output(name: str, dropout: bool) -> None:
    for case, dtype in cases(name):
        shape, (before, after), padding = case
        n, c, h, w = shape
        draw = Draw(device_of(name), dtype)
        made, kept = draw.maps(n, c + padding, h, w), draw.dropout(*shape, keep=0.8) if dropout else None
        slot, into = draw.maps(*shape, before=before, after=after), interface.Statistics(draw.normal(c), draw.normal(c))
        rest, expected = Untouched(slot), torch.empty(shape, device=slot.device, dtype=torch.float64)
        EXACT.store_output(made.double(), kept, expected, None)
        make_kernels(name).store_output(made, kept, slot, into)
        close(slot, expected, label=(case, dtype))
        check_statistics(slot, *into)
        rest.check()


@with_names
def test_variance_survives_a_mean_far_from_zero(name: str) -> None:
    """E[x^2] - E[x]^2 would have no correct digit, nor would a merge of parts with different means."""
    draw = Draw(device_of(name))
    made = draw.maps(*MANY_PIXELS) + 3e4
    made[1] += 100
    made[:, 1] = 3e4  # a constant channel
    mean, var = into = interface.Statistics(draw.normal(12), draw.normal(12))
    make_kernels(name).store_output(made, None, made, into)
    close(mean, made.double().mean((0, 2, 3)), 1e-6)
    close(var, made.double().var((0, 2, 3), unbiased=False), 2e-4)
    assert 0 <= var[1] < 1e-3


@with_names
@pytest.mark.parametrize("carried", ["nothing", "maps", "wide", "in place"])
def test_sum_gradients(name: str, carried: str) -> None:
    count = {"nothing": 1, "maps": interface.MAX_CONSUMERS, "wide": 2, "in place": 3}[carried]
    for case, dtype in cases(name):
        shape, (before, after), _ = case
        c = shape[1]
        draw = Draw(device_of(name), dtype)
        gradients = [draw.maps(*shape, before=before, after=after) for _ in range(count)]
        norms = [draw.norm(c) for _ in range(count)]
        x = draw.maps(*shape, before=before, after=after)
        keep_away_from_zero(x, norms)
        out = draw.maps(*shape, before=before, after=after, dtype=draw.wide if carried in ("nothing", "wide") else None)
        accumulator = out if carried == "in place" else None if carried == "nothing" else draw.maps(*shape)
        sums, shared = [draw.normal(2, c + 3)[:, :c] for _ in range(count)], draw.normal(2, c)
        corrected = [None if i == 2 else shared for i in range(count)]  # the third has constant statistics
        rest, expected = Untouched(out), torch.empty(shape, device=x.device, dtype=torch.float64)
        wanted = [torch.empty(2, c, device=x.device, dtype=torch.float64) for _ in range(count)]
        right = shared.double()
        exact = [
            Consumer(g.double(), NormGrad(double(norm), s, None if share is None else right))
            for g, norm, s, share in zip(gradients, norms, wanted, corrected, strict=True)
        ]
        EXACT.sum_gradients(x.double(), exact, None if accumulator is None else accumulator.double(), expected)
        consumers = [Consumer(g, NormGrad(*parts)) for g, *parts in zip(gradients, norms, sums, corrected, strict=True)]
        make_kernels(name).sum_gradients(x, consumers, accumulator, out)
        close(out, expected, label=(case, dtype))
        for found, exactly in zip([*sums, shared], [*wanted, right], strict=True):
            close(found, exactly, 1e-13 if draw.wide == torch.float64 else 5e-6, label=(case, dtype))
        rest.check()


@with_names
@pytest.mark.parametrize(("corrected", "dropout"), [(True, True), (True, False), (False, True)])
def test_correct_gradient(name: str, corrected: bool, dropout: bool) -> None:
    for case, dtype in cases(name):
        shape, (before, after), padding = case
        n, c, h, w = shape
        draw = Draw(device_of(name), dtype)
        gradient = draw.maps(*shape, before=before, after=after, dtype=draw.wide if corrected else None)
        x, out = draw.maps(*shape), draw.maps(n, c + padding, h, w, before=before, after=after)
        correction = Correction(draw.normal(c), draw.normal(2, c + 3)[:, :c], 3) if corrected else None
        kept = draw.dropout(*shape) if dropout else None
        rest, expected = Untouched(out), torch.empty(out.shape, device=x.device, dtype=torch.float64)
        exact = None if correction is None else Correction(correction.mean.double(), correction.sums.double(), 3)
        other, norm = draw.maps(2, 37, 5, 3), draw.norm(37)
        rectified, rectified_exactly = draw.maps(2, 40, 5, 3), torch.empty(2, 40, 5, 3, device=x.device).double()
        exactly = interface.BNReLU(other.double(), double(norm), rectified_exactly)
        EXACT.correct_gradient(OutputGradient(gradient.double(), x.double(), exact, kept), expected, exactly)
        also = None if case is CASES[0] else interface.BNReLU(other, norm, rectified)
        make_kernels(name).correct_gradient(OutputGradient(gradient, x, correction, kept), out, also)
        close(out, expected, label=(case, dtype))
        if also is not None:
            close(rectified, rectified_exactly, label=(case, dtype))
        rest.check()


@with_names
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_passes_exactly_where_the_rectified_map_is_positive(name: str, dtype: torch.dtype) -> None:
    """Also where norm(x) is only a rounding error: the gradient must be that of the same function."""
    draw, kernels = Draw(device_of(name), dtype), make_kernels(name)
    x = draw.maps(1, 40, 9, 9)
    gamma, _, mean, var, eps = draw.norm(40)
    near = x[0, :, 4, 4].to(draw.wide)
    norm = Norm(gamma, -(near - mean) * gamma * torch.rsqrt(var + eps), mean, var, eps)
    x[0, :, :, ::2] = near.to(dtype)[:, None, None]
    out, back = torch.empty_like(x, dtype=dtype), torch.empty_like(x, dtype=draw.wide)
    kernels.bn_relu(x, norm, out)
    kernels.sum_gradients(x, [Consumer(torch.ones_like(x), NormGrad(norm, draw.normal(2, 40), None))], None, back)
    assert torch.equal(out > 0, back != 0)
    assert 0.05 < (out == 0).float().mean() < 0.95
    assert out[:, :, :, ::2].abs().max() < 1e-4


@with_names
def test_copy_weights(name: str) -> None:
    device, draw = device_of(name), Draw(device_of(name))
    sources = [draw.normal(35 + i, 455, 3, 3).contiguous(memory_format=torch.channels_last) for i in range(2)]
    sources += [draw.normal(7, 5, 1, 1) for _ in range(17)] + [draw.normal(8, 8, 3, 3).bfloat16()]
    shapes = [(40, 456, 3, 3)] * 2 + [(8, 8, 1, 1)] * 16 + [(5, 3, 1, 1), (5, 8, 3, 3)]
    outs = [torch.full(shape, math.nan, device=device) for shape in shapes]
    outs[0] = outs[0].bfloat16().contiguous(memory_format=torch.channels_last)
    make_kernels(name).copy_weights(sources, outs)
    for source, out in zip(sources, outs, strict=True):
        expected, (makes, reads) = torch.zeros_like(out), out.shape[:2]
        expected[: len(source), : source.shape[1]] = source[:makes, :reads]
        rtol = 2**-7 if out.dtype == torch.bfloat16 else 0  # the interpreter truncates
        torch.testing.assert_close(out, expected, rtol=rtol, atol=0)


class Padded(convolutions.Convolutions):
    """Pad channels to multiples of eight on any device, as on GPUs."""

    def padded(self, channels: int) -> int:
        return -(-channels // 8) * 8


@with_names
@pytest.mark.parametrize(
    ("bn_size", "drop_rate", "tail", "spoilt"),
    [(None, 0.0, "no tail", 0.0), (2, 0.0, "norm", 0.0), (2, 0.3, "norm and conv", 0.0), (None, 0.0, "norm", math.nan)],
)
def test_a_whole_block_with_padded_convolutions(
    monkeypatch: pytest.MonkeyPatch, name: str, bn_size: int | None, drop_rate: float, tail: str, spoilt: float
) -> None:
    # In float64, rounding cannot hide a wrong formula; Triton has no float64 matrix products on GPUs.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # TF32 convolutions have errors of 1e-3
    dtype, tolerance = (torch.float32, 1e-4) if device_of(name) == "cuda" else (torch.float64, 1e-10)
    kernels, found, x = make_kernels(name), [], maps((2, 7, 5, 3))
    x[1, 4, 2, 1] += spoilt
    monkeypatch.setattr(operator, "choose_kernels", lambda *_: kernels)
    for module in (forward, backward):
        monkeypatch.setattr(module, "choose_convolutions", Padded)
    for form in ("reference", "fused"):
        model = Block(form, channels=7, growth=5, bn_size=bn_size, drop_rate=drop_rate, tail=tail)
        model.to(device_of(name), dtype, memory_format=torch.channels_last)
        found.append(take_step(model, x.to(device_of(name), dtype)))
    assert_same(found[1], found[0], tolerance)


@pytest.mark.skipif(INTERPRETED, reason="C++ alone")
def test_bfloat16_is_rounded_as_pytorch_rounds_it() -> None:
    """To nearest, ties to even: all upper halves of a float32 with the lower halves that matter."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    values = (upper[:, None] | lower).view(torch.float32)
    gradient = values.reshape(1, 1, *values.shape).clone()
    maps = torch.zeros(gradient.shape, dtype=torch.bfloat16)
    out = torch.empty_like(maps)
    NativeKernels().correct_gradient(OutputGradient(gradient, maps), out)
    expected = gradient.bfloat16()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num().view(torch.int16), expected.nan_to_num().view(torch.int16))
    assert math.isinf(out.nan_to_num(0, math.inf, -math.inf).float().max())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a GPU: takes gigabytes")
def test_offsets_beyond_32_bits() -> None:
    ld, draw = 2**30 + 8, Draw("cuda", torch.bfloat16)
    buffer = torch.empty(3 * ld, dtype=torch.bfloat16, device="cuda")
    x = buffer.as_strided((3, 40, 1, 1), (ld, 1, ld, ld))
    x.copy_(draw.maps(3, 40, 1, 1))
    out, norm, expected = draw.maps(3, 40, 1, 1), draw.norm(40), torch.empty(3, 40, 1, 1, device="cuda").double()
    make_kernels("triton").bn_relu(x, norm, out)
    EXACT.bn_relu(x.double(), double(norm), expected)
    close(out, expected)
