"""The kernels for CPUs, in C++: see ``native.cpp``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from densenet_dist.model.kernels.build import native_library
from densenet_dist.model.kernels.interface import (
    BNReLU,
    Consumer,
    Dropout,
    Kernels,
    Norm,
    NormGrad,
    OutputGradient,
    Statistics,
    accumulation_type,
)

TYPES: Final = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16"}
KERNEL_SIZES: Final = (1, 3)
"""Sizes of the convolutions that C++ can compute."""

_CONVOLUTION_TYPES: Final = (torch.float32, torch.float64)
_P, _I, _D, _N = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
_SIGNATURES: Final[dict[str, tuple[Any, ...]]] = {
    "bn_relu": (_I, _I, _I, _P, _I, _P, _P, _P, _P, _D, _P, _I, _N),
    "store_output": (_I, _I, _P, _I, _P, _D, _P, _I, _P, _P, _N),
    "sum_gradients": (_I, _I, _P, _I, _I, _P, _P, _I, _P, _I, _N, _N),
    "correct_gradient": (_I, _I, _I, _P, _I, _P, _I, _P, _P, _P, _P, _D, _P, _I, _N, _N),
}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class _Convolution(ctypes.Structure):
    """Mirrors ``Convolution`` of native_convolution.h; the two subclasses below mirror its subclasses."""

    _fields_ = (
        *((name, _I) for name in ("images", "height", "width", "channels", "out_channels")), ("x", _P), ("ldx", _I),
        *((name, _P) for name in ("gamma", "beta", "mean", "var")), ("eps", _D), ("weight", _P), ("threads", _I),
    )  # fmt: skip


class _ConvolutionForward(_Convolution):
    _fields_ = (
        ("mask", _P), ("keep", _D), ("slot", _P), ("lds", _I), ("slot_mean", _P), ("slot_var", _P),
    )  # fmt: skip


class _ConvolutionBackward(_Convolution):
    _fields_ = (
        ("d_output", _P), ("ldd", _I), ("accumulator", _P), ("ldc", _I), ("out", _P), ("ldo", _I), ("sums", _P),
        ("d_weight", _P),
    )  # fmt: skip


class _Consumer(ctypes.Structure):
    _fields_ = (
        ("gradient", _P), ("ld", _I), ("gamma", _P), ("beta", _P), ("mean", _P), ("var", _P), ("eps", _D), ("sums", _P),
    )  # fmt: skip


class NativeKernels(Kernels):
    """The kernels for maps in float32, float64 and bfloat16, and convolutions for the first two.

    Args:
        library: the compiled kernels; None: those for this processor.

    Attributes:
        name: identifies the processor, the compiler and the version of the kernels.

    Raises:
        BuildError: the library cannot be built.
    """

    def __init__(self, library: ctypes.CDLL | None = None) -> None:
        library = native_library() if library is None else library
        self.name = Path(library._name).stem
        _keep_freed_memory()
        self._functions: dict[tuple[str, torch.dtype], Callable[..., None]] = {}
        for name, arguments in _SIGNATURES.items():
            for dtype, suffix in TYPES.items():
                function = getattr(library, f"{name}_{suffix}")
                function.argtypes, function.restype = arguments, None
                self._functions[name, dtype] = function
        for dtype in _CONVOLUTION_TYPES:
            for size in KERNEL_SIZES:
                for name in (f"conv{size}x{size}", f"conv{size}x{size}_backward"):
                    function = getattr(library, f"{name}_{TYPES[dtype]}")
                    function.argtypes, function.restype = (_P,), None
                    self._functions[name, dtype] = function

    def bn_relu(self, maps: Tensor, norm: Norm, out: Tensor) -> None:
        """See `Kernels.bn_relu`."""
        pixels, channels, ld = _pixels(maps)
        _, padded, ldo = _pixels(out)
        self._functions["bn_relu", maps.dtype](
            pixels, channels, padded, maps.data_ptr(), ld, *_vectors(norm[:4], maps), norm.eps, out.data_ptr(), ldo,
            torch.get_num_threads(),
        )  # fmt: skip

    def store_output(self, output: Tensor, dropout: Dropout | None, slot: Tensor, into: Statistics | None) -> None:
        """See `Kernels.store_output`."""
        pixels, channels, lds = _pixels(slot)
        _, _, ld = _pixels(output)
        assert output.dtype == slot.dtype
        self._functions["store_output", slot.dtype](
            pixels, channels, output.data_ptr(), ld, *_dropout(dropout, slot), slot.data_ptr(), lds,
            *_vectors(into or (None, None), slot), torch.get_num_threads(),
        )  # fmt: skip

    def sum_gradients(
        self, maps: Tensor, consumers: Sequence[Consumer], accumulator: Tensor | None, out: Tensor
    ) -> None:
        """See `Kernels.sum_gradients`."""
        pixels, channels, ld = _pixels(maps)
        _, _, ldo = _pixels(out)
        assert accumulator is None or accumulator.dtype == maps.dtype
        assert out.shape == maps.shape
        ldc = ldo if accumulator is None else _pixels(accumulator)[2]
        structures = (_Consumer * len(consumers))()
        sums = maps.new_empty((len(consumers), 2, channels), dtype=accumulation_type(maps.dtype))
        for structure, (gradient, (norm, *_)), own_sums in zip(structures, consumers, sums, strict=True):
            assert gradient.dtype == maps.dtype
            assert gradient.shape == maps.shape
            structure.gradient, (_, _, structure.ld) = gradient.data_ptr(), _pixels(gradient)
            structure.gamma, structure.beta, structure.mean, structure.var = _vectors(norm[:4], maps)
            structure.eps, structure.sums = norm.eps, own_sums.data_ptr()
        self._functions["sum_gradients", maps.dtype](
            pixels, channels, maps.data_ptr(), ld, len(consumers), ctypes.addressof(structures),
            None if accumulator is None else accumulator.data_ptr(), ldc, out.data_ptr(), ldo, _is_wide(out, maps),
            torch.get_num_threads(),
        )  # fmt: skip
        for consumer, own_sums in zip(consumers, sums, strict=True):
            consumer.norm_grad.apply_sums(own_sums)

    def correct_gradient(self, d_output: OutputGradient, out: Tensor, also: BNReLU | None = None) -> None:
        """See `Kernels.correct_gradient`."""
        gradient, maps, correction, dropout, _ = d_output
        pixels, channels, ld = _pixels(maps)
        _, _, ldg = _pixels(gradient)
        _, padded, ldo = _pixels(out)
        divided = (None,) * 3 if correction is None else (correction.mean, *(correction.sums / correction.values))
        self._functions["correct_gradient", maps.dtype](
            pixels, channels, padded, gradient.data_ptr(), ldg, maps.data_ptr(), ld, *_vectors(divided, maps),
            *_dropout(dropout, maps), out.data_ptr(), ldo, _is_wide(gradient, maps), torch.get_num_threads(),
        )  # fmt: skip
        if also is not None:
            self.bn_relu(*also)

    def convolve(
        self, maps: Tensor, norm: Norm, weight: Tensor, dropout: Dropout | None, slot: Tensor, into: Statistics | None
    ) -> None:
        """Compute ``conv(relu(norm(maps)))`` and store it as `store_output` does, which explains the other arguments.

        Args:
            maps: (N, C, H, W).
            norm: of `maps`.
            weight: (K, C, 1, 1) or (K, C, 3, 3), contiguous, of the maps' dtype; stride 1, "same" padding with zeros.
            slot: (N, K, H, W).
        """
        pixels, out_channels, lds = _pixels(slot)
        assert pixels == _pixels(maps)[0]
        assert slot.dtype == maps.dtype
        call = _ConvolutionForward(*_convolution(maps, norm, weight, out_channels))
        call.mask, call.keep = _dropout(dropout, slot)
        call.slot, call.lds = slot.data_ptr(), lds
        call.slot_mean, call.slot_var = _vectors(into or (None, None), slot)
        self._functions[_name(weight), maps.dtype](ctypes.addressof(call))

    def convolve_backward(
        self, maps: Tensor, norm_grad: NormGrad, weight: Tensor, d_output: Tensor, accumulator: Tensor | None,
        out: Tensor, d_weight: Tensor | None,
    ) -> None:  # fmt: skip
        """Compute the backward pass of `convolve`, then `sum_gradients` with the result as its only consumer.

        Args:
            maps: (N, C, H, W).
            norm_grad: as for `sum_gradients`.
            weight: as for `convolve`.
            d_output: (N, K, H, W), the gradient with respect to the convolution's output.
            accumulator: as for `sum_gradients`.
            out: as for `sum_gradients`, of the maps' dtype.
            d_weight: of the weight's shape, contiguous, overwritten with its gradient; None: not needed.
        """
        pixels, channels, _ = _pixels(maps)
        output_pixels, out_channels, ldd = _pixels(d_output)
        _, _, ldo = _pixels(out)
        assert output_pixels == pixels
        assert out.shape == maps.shape
        assert d_output.dtype == out.dtype == maps.dtype
        assert accumulator is None or (accumulator.dtype == maps.dtype and accumulator.shape == maps.shape)
        sums = maps.new_empty((2, channels), dtype=accumulation_type(maps.dtype))
        call = _ConvolutionBackward(*_convolution(maps, norm_grad.norm, weight, out_channels))
        call.d_output, call.ldd = d_output.data_ptr(), ldd
        if accumulator is not None:
            call.accumulator, call.ldc = accumulator.data_ptr(), _pixels(accumulator)[2]
        call.out, call.ldo = out.data_ptr(), ldo
        call.sums, call.d_weight = sums.data_ptr(), _pointer(d_weight, weight.shape, maps.dtype)
        self._functions[f"{_name(weight)}_backward", maps.dtype](ctypes.addressof(call))
        norm_grad.apply_sums(sums)


def _keep_freed_memory() -> None:
    """Make glibc keep up to 512 MiB of freed memory: page faults of new memory cost 4 % of a step."""
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, 512 * 2**20)
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)


def _name(weight: Tensor) -> str:
    return f"conv{weight.shape[2]}x{weight.shape[3]}"


def _convolution(maps: Tensor, norm: Norm, weight: Tensor, out_channels: int) -> tuple[Any, ...]:
    """Return the fields of `_Convolution`."""
    images, channels, height, width = maps.shape
    return (
        images, height, width, channels, out_channels, maps.data_ptr(), _pixels(maps)[2],
        *_vectors(norm[:4], maps), norm.eps, _pointer(weight, (out_channels, channels, *weight.shape[2:]), maps.dtype),
        torch.get_num_threads(),
    )  # fmt: skip


def _pixels(maps: Tensor) -> tuple[int, int, int]:
    """Return the number of pixels (N H W), the channels, and the elements from one pixel to the next.

    C++ trusts the pointers that it gets, so the layout is checked here.
    """
    n, channels, height, width = maps.shape
    ld = maps.stride(3) if width > 1 else maps.stride(2) if height > 1 else maps.stride(0)
    dense = (
        maps.device.type == "cpu"
        and (channels == 1 or maps.stride(1) == 1)
        and (height == 1 or maps.stride(2) == ld * width)
        and (n == 1 or maps.stride(0) == ld * width * height)
    )
    assert dense, f"maps of strides {maps.stride()} for shape {tuple(maps.shape)} on {maps.device}"
    return n * height * width, channels, ld


def _vectors(vectors: Iterable[Tensor | None], maps: Tensor) -> list[int | None]:
    """Return the addresses of vectors with one element per channel."""
    return [_pointer(vector, maps.shape[1:2], accumulation_type(maps.dtype)) for vector in vectors]


def _pointer(tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> int | None:
    if tensor is None:
        return None
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def _dropout(dropout: Dropout | None, maps: Tensor) -> tuple[int | None, float]:
    if dropout is None:
        return None, 1.0
    mask, keep = dropout
    assert mask.dtype == torch.bool
    assert mask.shape == maps.shape
    assert mask.is_contiguous(memory_format=torch.channels_last)
    return mask.data_ptr(), keep


def _is_wide(values: Tensor, maps: Tensor) -> bool:
    assert values.dtype in (maps.dtype, accumulation_type(maps.dtype))
    return values.dtype != maps.dtype
