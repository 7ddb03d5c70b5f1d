"""The passes on a CPU, in C++: see ``native.cpp``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from densenet_dist.model.kernels.build import native_library
from densenet_dist.model.kernels.interface import Consumer, Kernels, Norm, accumulation_type

TYPES: Final = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16"}

_P, _I, _D, _N = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
_SIGNATURES: Final[dict[str, tuple[Any, ...]]] = {
    "bn_relu": (_I, _I, _I, _P, _I, _P, _P, _P, _P, _D, _P, _I, _N),
    "write": (_I, _I, _P, _I, _P, _D, _P, _I, _P, _P, _N),
    "gather": (_I, _I, _P, _I, _I, _P, _P, _I, _P, _I, _N, _N),
    "finish": (_I, _I, _I, _P, _I, _P, _I, _P, _P, _P, _P, _D, _P, _I, _N, _N),
    "conv1x1": (_I, _I, _I, _P, _I, _P, _P, _P, _P, _D, _P, _P, _D, _P, _I, _P, _P, _N),
    "conv1x1_backward": (_I, _I, _I, _P, _I, _P, _P, _P, _P, _D, _P, _P, _I, _P, _I, _P, _I, _P, _P, _N),
}
_CONVOLVED: Final = (torch.float32, torch.float64)


class _Consumer(ctypes.Structure):
    _fields_ = (
        ("gradient", _P), ("ld", _I), ("gamma", _P), ("beta", _P), ("mean", _P), ("var", _P), ("eps", _D), ("sums", _P),
    )  # fmt: skip


class NativeKernels(Kernels):
    """The passes for maps in float32, float64 and bfloat16 on a CPU.

    Raises:
        BuildError: when made where the library cannot be built.
    """

    def __init__(self) -> None:
        library = native_library()
        self._functions: dict[tuple[str, torch.dtype], Callable[..., None]] = {}
        for name, arguments in _SIGNATURES.items():
            for dtype, suffix in TYPES.items():
                if name.startswith("conv1x1") and dtype not in _CONVOLVED:
                    continue
                function = getattr(library, f"{name}_{suffix}")
                function.argtypes, function.restype = arguments, None
                self._functions[name, dtype] = function

    @staticmethod
    def convolves(weight: Tensor | None, dtype: torch.dtype) -> bool:
        """Whether `conv1x1` and `conv1x1_backward` are there for a unit of this weight and maps of this type."""
        return weight is not None and weight.shape[2:] == (1, 1) and dtype in _CONVOLVED

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
        for into, (gradient, norm, sums) in zip(described, consumers, strict=True):
            assert gradient.dtype == maps.dtype
            assert gradient.shape == maps.shape
            into.gradient, (_, _, into.ld) = gradient.data_ptr(), _rows(gradient)
            into.gamma, into.beta, into.mean, into.var = _pointers(norm, channels, maps.dtype)
            into.eps, into.sums = norm.eps, _vector(sums, 2 * channels, maps.dtype)
        self._functions["gather", maps.dtype](
            rows, channels, maps.data_ptr(), ld, len(consumers), ctypes.addressof(described),
            None if carry is None else carry.data_ptr(), ldc, out.data_ptr(), ldo, _is_wide(out, maps),
            torch.get_num_threads(),
        )  # fmt: skip

    def finish(
        self, gradient: Tensor, maps: Tensor, correction: tuple[Tensor, Tensor, Tensor] | None, mask: Tensor | None,
        keep: float, out: Tensor,
    ) -> None:  # fmt: skip
        """Apply the statistics' share of the gradient, then dropout's."""
        rows, channels, ld = _rows(maps)
        _, _, ldg = _rows(gradient)
        _, padded, ldo = _rows(out)
        vectors = [_vector(vector, channels, maps.dtype) for vector in correction or (None, None, None)]
        self._functions["finish", maps.dtype](
            rows, channels, padded, gradient.data_ptr(), ldg, maps.data_ptr(), ld, *vectors, _mask(mask, maps), keep,
            out.data_ptr(), ldo, _is_wide(gradient, maps), torch.get_num_threads(),
        )  # fmt: skip

    def conv1x1(
        self, maps: Tensor, norm: Norm, weight: Tensor, mask: Tensor | None, keep: float, slot: Tensor,
        mean: Tensor | None, var: Tensor | None,
    ) -> None:  # fmt: skip
        """`write` of ``conv(relu(norm(maps)))``; `weight`: (K, C, 1, 1), of the maps' type."""
        rows, channels, ld = _rows(maps)
        slot_rows, makes, lds = _rows(slot)
        assert slot_rows == rows
        assert slot.dtype == maps.dtype
        assert (mean is None) == (var is None)
        self._functions["conv1x1", maps.dtype](
            rows, channels, makes, maps.data_ptr(), ld, *_pointers(norm, channels, maps.dtype), norm.eps,
            _matrix(weight, makes, channels, maps.dtype), _mask(mask, slot), keep, slot.data_ptr(), lds,
            _vector(mean, makes, slot.dtype), _vector(var, makes, slot.dtype), torch.get_num_threads(),
        )  # fmt: skip

    def conv1x1_backward(
        self, maps: Tensor, norm: Norm, weight: Tensor, d_made: Tensor, carry: Tensor | None, out: Tensor, sums: Tensor,
        d_weight: Tensor | None,
    ) -> None:  # fmt: skip
        """Back through `conv1x1`, and `gather` of what comes out of it.

        Args:
            maps: (N, C, H, W): x.
            norm: of x.
            weight: (K, C, 1, 1), of the maps' type.
            d_made: (N, K, H, W), the gradient of what the convolution made.
            carry: as for `gather`.
            out: as for `gather`, of the maps' type.
            sums: (2, C), as those of `Consumer`.
            d_weight: of the weight's shape, contiguous, becomes its gradient; None: not wanted.
        """
        rows, channels, ld = _rows(maps)
        made_rows, makes, ldd = _rows(d_made)
        _, _, ldo = _rows(out)
        assert made_rows == rows
        assert out.shape == maps.shape
        assert d_made.dtype == out.dtype == maps.dtype
        assert carry is None or (carry.dtype == maps.dtype and carry.shape == maps.shape)
        self._functions["conv1x1_backward", maps.dtype](
            rows, channels, makes, maps.data_ptr(), ld, *_pointers(norm, channels, maps.dtype), norm.eps,
            _matrix(weight, makes, channels, maps.dtype), d_made.data_ptr(), ldd,
            None if carry is None else carry.data_ptr(), ldo if carry is None else _rows(carry)[2], out.data_ptr(), ldo,
            _vector(sums, 2 * channels, maps.dtype),
            None if d_weight is None else _matrix(d_weight, makes, channels, maps.dtype), torch.get_num_threads(),
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


def _matrix(weight: Tensor, makes: int, channels: int, dtype: torch.dtype) -> int:
    assert weight.dtype == dtype
    assert tuple(weight.shape) == (makes, channels, 1, 1)
    return _vector(weight.view(makes, channels), makes * channels, dtype) or 0


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
