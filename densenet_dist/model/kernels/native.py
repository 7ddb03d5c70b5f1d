"""The passes on a CPU, in C++: see ``native.cpp``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from densenet_dist.model.kernels.build import native_library
from densenet_dist.model.kernels.interface import Consumer, Correction, Kernels, Norm, Rectify, accumulation_type

TYPES: Final = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16"}

_P, _I, _D, _N = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
_SIGNATURES: Final[dict[str, tuple[Any, ...]]] = {
    "bn_relu": (_I, _I, _I, _P, _I, _P, _P, _P, _P, _D, _P, _I, _N),
    "write": (_I, _I, _P, _I, _P, _D, _P, _I, _P, _P, _N),
    "gather": (_I, _I, _P, _I, _I, _P, _P, _I, _P, _I, _N, _N),
    "finish": (_I, _I, _I, _P, _I, _P, _I, _P, _P, _P, _P, _D, _P, _I, _N, _N),
}
_CONVOLVED: Final = (torch.float32, torch.float64)
SIDES: Final = (1, 3)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class _Convolution(ctypes.Structure):
    _fields_ = (
        *((name, _I) for name in ("images", "height", "width", "channels", "makes")), ("x", _P), ("ldx", _I),
        *((name, _P) for name in ("gamma", "beta", "mean", "var")), ("eps", _D), ("weight", _P), ("threads", _I),
    )  # fmt: skip


class _ConvolutionForward(_Convolution):
    _fields_ = (
        ("mask", _P), ("keep", _D), ("slot", _P), ("lds", _I), ("slot_mean", _P), ("slot_var", _P),
    )  # fmt: skip


class _ConvolutionBackward(_Convolution):
    _fields_ = (
        ("d_made", _P), ("ldd", _I), ("carry", _P), ("ldc", _I), ("out", _P), ("ldo", _I), ("sums", _P),
        ("d_weight", _P),
    )  # fmt: skip


class _Consumer(ctypes.Structure):
    _fields_ = (
        ("gradient", _P), ("ld", _I), ("gamma", _P), ("beta", _P), ("mean", _P), ("var", _P), ("eps", _D), ("sums", _P),
    )  # fmt: skip


class NativeKernels(Kernels):
    """The passes for maps in float32, float64 and bfloat16 on a CPU, and convolutions for the first two.

    Args:
        library: the compiled kernels; None: those for this processor.

    Attributes:
        name: tells libraries for other processors, compilers and versions of the kernels apart.

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
        for dtype in _CONVOLVED:
            for side in SIDES:
                for name in (f"conv{side}x{side}", f"conv{side}x{side}_backward"):
                    function = getattr(library, f"{name}_{TYPES[dtype]}")
                    function.argtypes, function.restype = (_P,), None
                    self._functions[name, dtype] = function

    @staticmethod
    def convolves(weight: Tensor | None, dtype: torch.dtype) -> bool:
        """Return whether `convolve` takes this weight and maps of this type."""
        return weight is not None and weight.shape[2] == weight.shape[3] in SIDES and dtype in _CONVOLVED

    def bn_relu(self, maps: Tensor, norm: Norm, out: Tensor) -> None:
        """Normalise and rectify."""
        rows, channels, ld = _rows(maps)
        _, padded, ldo = _rows(out)
        self._functions["bn_relu", maps.dtype](
            rows, channels, padded, maps.data_ptr(), ld, *_pointers(norm, channels, maps.dtype), norm.eps,
            out.data_ptr(), ldo, torch.get_num_threads(),
        )  # fmt: skip

    def write(
        self, made: Tensor, mask: Tensor | None, keep: float, slot: Tensor, mean: Tensor | None, var: Tensor | None
    ) -> None:
        """Drop, store, and take the statistics of what was stored."""
        rows, channels, lds = _rows(slot)
        _, _, ldm = _rows(made)
        assert made.dtype == slot.dtype
        assert (mean is None) == (var is None)
        self._functions["write", slot.dtype](
            rows, channels, made.data_ptr(), ldm, _mask(mask, slot), keep, slot.data_ptr(), lds,
            _vector(mean, channels, slot.dtype), _vector(var, channels, slot.dtype), torch.get_num_threads(),
        )  # fmt: skip

    def gather(self, maps: Tensor, consumers: Sequence[Consumer], carry: Tensor | None, out: Tensor) -> None:
        """Sum what came back to the consumers."""
        rows, channels, ld = _rows(maps)
        _, _, ldo = _rows(out)
        assert carry is None or carry.dtype == maps.dtype
        assert out.shape == maps.shape
        ldc = ldo if carry is None else _rows(carry)[2]
        described = (_Consumer * len(consumers))()
        sums = maps.new_empty((len(consumers), 2, channels), dtype=accumulation_type(maps.dtype))
        for into, (gradient, (norm, *_)), summed in zip(described, consumers, sums, strict=True):
            assert gradient.dtype == maps.dtype
            assert gradient.shape == maps.shape
            into.gradient, (_, _, into.ld) = gradient.data_ptr(), _rows(gradient)
            into.gamma, into.beta, into.mean, into.var = _pointers(norm, channels, maps.dtype)
            into.eps, into.sums = norm.eps, _vector(summed, 2 * channels, maps.dtype)
        self._functions["gather", maps.dtype](
            rows, channels, maps.data_ptr(), ld, len(consumers), ctypes.addressof(described),
            None if carry is None else carry.data_ptr(), ldc, out.data_ptr(), ldo, _is_wide(out, maps),
            torch.get_num_threads(),
        )  # fmt: skip
        for (_, reader), summed in zip(consumers, sums, strict=True):
            reader.settle(summed)

    def finish(
        self, gradient: Tensor, maps: Tensor, correction: Correction | None, mask: Tensor | None, keep: float,
        out: Tensor, also: Rectify | None = None,
    ) -> None:  # fmt: skip
        """Apply the statistics' share of the gradient, then dropout's."""
        rows, channels, ld = _rows(maps)
        _, _, ldg = _rows(gradient)
        _, padded, ldo = _rows(out)
        settled = (None,) * 3 if correction is None else (correction.mean, *(correction.sums / correction.values))
        vectors = [_vector(vector, channels, maps.dtype) for vector in settled]
        self._functions["finish", maps.dtype](
            rows, channels, padded, gradient.data_ptr(), ldg, maps.data_ptr(), ld, *vectors, _mask(mask, maps), keep,
            out.data_ptr(), ldo, _is_wide(gradient, maps), torch.get_num_threads(),
        )  # fmt: skip
        if also is not None:
            self.bn_relu(*also)

    def convolve(
        self, maps: Tensor, norm: Norm, weight: Tensor, mask: Tensor | None, keep: float, slot: Tensor,
        mean: Tensor | None, var: Tensor | None,
    ) -> None:  # fmt: skip
        """Compute `write` of ``conv(relu(norm(maps)))``.

        Args:
            maps: (N, C, H, W).
            norm: of `maps`.
            weight: (K, C, 1, 1) or (K, C, 3, 3), of the maps' type; stride 1, zero padding that keeps H and W.
            mask: as for `write`.
            keep: as for `write`.
            slot: (N, K, H, W).
            mean: as for `write`, (K,).
            var: as for `write`, (K,).
        """
        slot_rows, makes, lds = _rows(slot)
        assert slot_rows == _rows(maps)[0]
        assert slot.dtype == maps.dtype
        assert (mean is None) == (var is None)
        call = _ConvolutionForward(*_convolution(maps, norm, weight, makes))
        call.mask, call.keep = _mask(mask, slot), keep
        call.slot, call.lds = slot.data_ptr(), lds
        call.slot_mean, call.slot_var = _vector(mean, makes, slot.dtype), _vector(var, makes, slot.dtype)
        self._functions[_name(weight), maps.dtype](ctypes.addressof(call))

    def convolve_backward(
        self, maps: Tensor, norm: Norm, weight: Tensor, d_made: Tensor, carry: Tensor | None, out: Tensor, sums: Tensor,
        d_weight: Tensor | None,
    ) -> None:  # fmt: skip
        """Go back through `convolve`, and `gather` what comes out of it.

        Args:
            maps: (N, C, H, W): x.
            norm: of x.
            weight: as for `convolve`.
            d_made: (N, K, H, W), the gradient of what the convolution made.
            carry: as for `gather`.
            out: as for `gather`, of the maps' type.
            sums: (2, C), contiguous, accumulation type: becomes what `Reader.settle` takes.
            d_weight: of the weight's shape, contiguous, becomes its gradient; None: not wanted.
        """
        rows, channels, _ = _rows(maps)
        made_rows, makes, ldd = _rows(d_made)
        _, _, ldo = _rows(out)
        assert made_rows == rows
        assert out.shape == maps.shape
        assert d_made.dtype == out.dtype == maps.dtype
        assert carry is None or (carry.dtype == maps.dtype and carry.shape == maps.shape)
        call = _ConvolutionBackward(*_convolution(maps, norm, weight, makes))
        call.d_made, call.ldd = d_made.data_ptr(), ldd
        if carry is not None:
            call.carry, call.ldc = carry.data_ptr(), _rows(carry)[2]
        call.out, call.ldo = out.data_ptr(), ldo
        call.sums = _vector(sums, 2 * channels, maps.dtype)
        assert d_weight is None or d_weight.shape == weight.shape
        call.d_weight = None if d_weight is None else _weight(d_weight, makes, channels, maps.dtype)
        self._functions[f"{_name(weight)}_backward", maps.dtype](ctypes.addressof(call))


def _keep_freed_memory() -> None:
    """Have glibc keep up to 512 MiB of freed memory: fresh pages in each step cost 4 % of its time."""
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, 512 * 2**20)
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)


def _name(weight: Tensor) -> str:
    return f"conv{weight.shape[2]}x{weight.shape[3]}"


def _convolution(maps: Tensor, norm: Norm, weight: Tensor, makes: int) -> tuple[Any, ...]:
    """The fields of `_Convolution`."""
    images, channels, height, width = maps.shape
    return (
        images, height, width, channels, makes, maps.data_ptr(), _rows(maps)[2],
        *_pointers(norm, channels, maps.dtype), norm.eps, _weight(weight, makes, channels, maps.dtype),
        torch.get_num_threads(),
    )  # fmt: skip


def _rows(maps: Tensor) -> tuple[int, int, int]:
    """Pixels, channels, and elements from one pixel to the next.

    Pointers go to code that trusts them, so the layout is checked here.
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


def _vector(vector: Tensor | None, elements: int, dtype: torch.dtype) -> int | None:
    if vector is None:
        return None
    assert vector.dtype == accumulation_type(dtype)
    assert vector.numel() == elements
    assert vector.is_contiguous()
    return vector.data_ptr()


def _weight(weight: Tensor, makes: int, channels: int, dtype: torch.dtype) -> int:
    assert weight.dtype == dtype
    assert weight.shape[:2] == (makes, channels)
    assert weight.is_contiguous()
    return weight.data_ptr()


def _pointers(norm: Norm, channels: int, dtype: torch.dtype) -> list[int | None]:
    return [_vector(vector, channels, dtype) for vector in norm[:4]]


def _mask(mask: Tensor | None, maps: Tensor) -> int | None:
    if mask is None:
        return None
    assert mask.dtype == torch.bool
    assert mask.shape == maps.shape
    assert mask.is_contiguous(memory_format=torch.channels_last)
    return mask.data_ptr()


def _is_wide(values: Tensor, maps: Tensor) -> bool:
    assert values.dtype in (maps.dtype, accumulation_type(maps.dtype))
    return values.dtype != maps.dtype
